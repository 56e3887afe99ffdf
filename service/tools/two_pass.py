"""The two-pass reference: computes the whole text twice, without caches, stacked experts or our attention. Slow, and
obviously right.

    scaling pass   transformers' own forward, every expert added in a loop with the dummy row
    real pass      the same with the scalings

Knows transformers' modules and the checkpoint; uses no code of the server but the classifier's formula and the linears
of a quantised base. `xlora-serve check --verify` compares with it where PEFT cannot compute the same, and `xlora-serve
distill` learns from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from service.checkpoint import Checkpoint, LoraWeights
from service.model.classifier import Classifier
from service.model.loading.quantised import Quantization, quantise
from service.model.loading.skeleton import read_config
from service.model.targets import resolve_sites


def load_causal_lm(base: Path, dtype: torch.dtype) -> Any:
    """The base as transformers loads it, on the CPU, with eager attention; without downloads and remote code."""
    return AutoModelForCausalLM.from_pretrained(
        base,
        config=read_config(base),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )


class TwoPassModel:
    """The checkpoint in transformers' own modules on one device, with a hook on every adapted module."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        causal_lm = load_causal_lm(checkpoint.base_path, dtype)
        if quantization is not None:
            quantise(causal_lm.to(device), quantization, device, for_cpu=device.type == "cpu")
        self.causal_lm = causal_lm.to(device).eval().requires_grad_(False)
        self.sites = resolve_sites(checkpoint, self.causal_lm)
        self.gate: Tensor | None = None  # [T, S, E] of the current pass
        experts = len(checkpoint.experts)
        self.classifier = Classifier(checkpoint.classifier, checkpoint.xlora, experts, len(self.sites), device)
        for number, site in enumerate(self.sites):
            self.causal_lm.get_submodule(site).register_forward_hook(self._hook(number, site))

    def forward(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and scalings [T, S, E] of the text, T tokens."""
        scalings = self.scalings(self.scaling_pass(tokens))
        return self.real_pass(tokens, scalings), scalings

    @torch.inference_mode()
    def scaling_pass(self, tokens: Sequence[int]) -> Tensor:
        """The last hidden state [T, H], after the final norm."""
        self.gate = self._dummy_rows(len(tokens))
        ids = self._ids(tokens)
        hidden: Tensor = self.causal_lm(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        return hidden[0]

    @torch.inference_mode()
    def scalings(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] of the scaling pass -> [T, S, E]."""
        rows: Tensor = self.classifier(hidden)
        return rows.expand(len(hidden), len(self.sites), -1)

    @torch.inference_mode()
    def real_pass(self, tokens: Sequence[int], scalings: Tensor) -> Tensor:
        """Logits [T, V]."""
        self.gate = scalings
        logits: Tensor = self.causal_lm(input_ids=self._ids(tokens), use_cache=False).logits
        return logits[0]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> logits [n, V] of the scaling pass; gradients flow through it."""
        self.gate = self._dummy_rows(len(hidden))
        prefix = self.causal_lm.base_model_prefix
        decoder = getattr(self.causal_lm, prefix)
        setattr(self.causal_lm, prefix, _Given(hidden.to(self.causal_lm.dtype)[None]))
        try:
            logits: Tensor = self.causal_lm(input_ids=self._ids([0] * len(hidden)), use_cache=False).logits
        finally:
            setattr(self.causal_lm, prefix, decoder)
        return logits[0].float()

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.causal_lm.device)

    def _dummy_rows(self, count: int) -> Tensor:
        return self.classifier.dummy_row().to(self.causal_lm.device)[None].expand(count, len(self.sites), -1)

    def _hook(self, number: int, site: str) -> Any:
        """Adds global_scaling_weight * sum_e g[e] * scale_e * B_e A_e x to the module's output."""
        device, dtype = self.causal_lm.device, self.causal_lm.dtype
        experts = [
            (e, expert.weights[site].loaded(device, dtype))
            for e, expert in enumerate(self.checkpoint.experts)
            if site in expert.weights
        ]

        def add_experts(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert self.gate is not None
            for e, expert in experts:
                weight = self.gate[:, number, e, None].to(output.dtype) * self.checkpoint.xlora.global_scaling_weight
                output = output + weight * _update(expert, module, inputs[0])
            return output

        return add_experts


class _Output(BaseModelOutputWithPast):
    """A decoder output with a hidden state only; fields of single families read as None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Replaces the decoder, and returns a given hidden state."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden  # [1, n, H]

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=self.hidden)


def _update(weights: LoraWeights, module: nn.Module, x: Tensor) -> Tensor:
    """scale * B A x of one expert, [1, T, out]."""
    a, b = weights.a[...], weights.b[...]
    if weights.embedding:
        ranks, scale = F.embedding(x, a.T), getattr(module, "embed_scale", None)
        return F.linear(ranks, b) * weights.scale * (1.0 if scale is None else scale)
    return F.linear(F.linear(x, a), b) * weights.scale
