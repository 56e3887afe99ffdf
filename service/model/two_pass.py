"""The plain computation: the whole text, twice, without caches, stacks or attention of ours. Slow, and obviously right.

    scaling pass   transformers' own forward, every expert added in a loop with the dummy row
    real pass      the same with the scalings

Knows transformers' modules and the checkpoint; shares no code with what serves requests but the classifier's formula.
`xlora-serve check --verify` compares with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from service.checkpoint import Checkpoint, Expert
from service.model.classifier import Classifier
from service.model.xlora_model import resolve_sites


class TwoPassModel:
    """The checkpoint in transformers' own modules on one device, with a hook on every adapted module."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        causal_lm: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.base_path,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        self.causal_lm = causal_lm.to(device).eval()
        self.sites = resolve_sites(checkpoint, self.causal_lm)
        self.gate: Tensor | None = None  # [T, S, E] of the pass under way
        experts = len(checkpoint.experts)
        self.classifier = Classifier(checkpoint.classifier, checkpoint.xlora, experts, len(self.sites), device)
        for number, site in enumerate(self.sites):
            self.causal_lm.get_submodule(site).register_forward_hook(self._hook(number, site))

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and scalings [T, S, E] of the text, T tokens."""
        ids = torch.tensor([list(tokens)], device=self.causal_lm.device)
        shape = (len(tokens), len(self.sites), -1)
        self.gate = self.classifier.dummy_row().to(ids.device)[None].expand(shape)
        hidden = self.causal_lm(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        self.gate = self.classifier(hidden[0]).expand(shape)
        return self.causal_lm(input_ids=ids, use_cache=False).logits[0], self.gate

    def _hook(self, number: int, site: str) -> Any:
        """Adds global_scaling_weight * sum_e g[e] * scale_e * B_e A_e x to the module's output."""
        experts = [(e, expert) for e, expert in enumerate(self.checkpoint.experts) if site in expert.weights]

        def add_experts(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert self.gate is not None
            for e, expert in experts:
                weight = self.gate[:, number, e, None].to(output.dtype) * self.checkpoint.xlora.global_scaling_weight
                output = output + weight * _update(expert, site, module, inputs[0], output.dtype)
            return output

        return add_experts


def _update(expert: Expert, site: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * B A x of one expert, [1, T, out]."""
    weights = expert.weights[site]
    a, b = weights.a.to(x.device, dtype), weights.b.to(x.device, dtype)
    if weights.embedding:
        narrow, scale = F.embedding(x, a.T), getattr(module, "embed_scale", None)
        return F.linear(narrow, b) * weights.scale * (1.0 if scale is None else scale)
    return F.linear(F.linear(x, a), b) * weights.scale
