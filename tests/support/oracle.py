"""The oracle: PEFT's XLoraModel, built in memory from a bundle's files (its own save and load are broken).

Also the plain uncached two-pass computation over it: scalings of a text, logits of a text, greedy tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import XLoraConfig as PeftXLoraConfig
from peft import get_peft_model
from peft.tuners.xlora.classifier import XLoraClassifier
from peft.tuners.xlora.layer import XLoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from service.checkpoint import XLoraConfig


class PeftOracle:
    """A bundle in PEFT's own classes, fp32 on the CPU. Slow on purpose: every call recomputes everything, twice."""

    def __init__(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        config = json.loads((bundle / manifest["classifier"] / "xlora_config.json").read_text())
        base = AutoModelForCausalLM.from_pretrained(
            bundle / manifest["base"], dtype=torch.float32, attn_implementation="eager"
        )
        base.config.use_cache = False
        adapters = {str(i): str(bundle / expert["path"]) for i, expert in enumerate(manifest["experts"])}
        fields = {
            name: config[name]
            for name in PeftXLoraConfig.__dataclass_fields__
            if name in config and name not in _NOT_PEFTS
        }
        if fields.get("scaling_pass_value", 0.0) is None:
            fields["scaling_pass_value"] = 1.0 / len(adapters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_config = PeftXLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **fields)
            self.model = get_peft_model(base, peft_config).eval()
        self.xlora = self.model.base_model
        self.classifier = self.xlora.internal_xlora_classifier
        _set_classifier(self.classifier, load_file(bundle / manifest["classifier"] / "xlora_classifier.safetensors"))
        self.sites = [
            name.removeprefix("base_model.lora_model.model.")
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A") and isinstance(getattr(module.forward, "__self__", None), XLoraLayer)
        ]

    def reconfigure(self, config: XLoraConfig, layers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Same base and experts under another configuration and another classifier, without touching the disk."""
        for name in PeftXLoraConfig.__dataclass_fields__:
            if hasattr(config, name) and name not in _NOT_PEFTS:
                setattr(self.xlora.xlora_config, name, getattr(config, name))
        experts = len(self.xlora.xlora_config.adapters)
        classifier = XLoraClassifier(self.model, self.xlora.xlora_config, experts, len(self.sites), torch.device("cpu"))
        linears = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad():
            for linear, (weight, bias) in zip(linears, layers, strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias if bias is not None else torch.zeros_like(linear.bias))
        self.classifier = self.xlora.internal_xlora_classifier = classifier.eval()
        self.xlora.set_scaling_pass_value(config.scaling_pass_value)  # null becomes 1/E here, and only here

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """Returns [T, V]: the real pass over `tokens`."""
        return self.model(input_ids=torch.tensor([tokens])).logits[0]

    @torch.inference_mode()
    def scalings(self, tokens: list[int]) -> Tensor:
        """Returns [T, S, E] after softmax and top-k: `get_latest_scalings()` is before top-k, so PEFT's own layers
        finish it.
        """
        return self.forward(tokens)[1]

    @torch.inference_mode()
    def forward(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Returns logits [T, V] and scalings [T, S, E] of one real pass."""
        logits = self.logits(tokens)
        before = self.xlora.internal_xlora_scalings
        layers = [
            module.forward.__self__
            for module in self.model.modules()
            if isinstance(getattr(module.forward, "__self__", None), XLoraLayer)
        ]
        layers.sort(key=lambda layer: layer.layer_number)
        return logits, torch.stack([layer.get_maybe_topk_scalings(before)[0] for layer in layers], dim=1)

    def greedy(self, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
        """Returns `steps` greedy tokens and, per step, the margin between the two best logits."""
        tokens, margins = list(prompt), []
        for _ in range(steps):
            best = self.logits(tokens)[-1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :], margins


_NOT_PEFTS = {"adapters", "task_type", "peft_type", "auto_mapping"}


def _set_classifier(classifier: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies the bundle's classifier tensors into PEFT's Sequential, in numeric order, `last` last."""
    linears = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
    inner = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("inner.")})
    prefixes = [f"inner.{number}" for number in inner] + ["last"]
    assert len(prefixes) == len(linears)
    with torch.no_grad():
        for prefix, linear in zip(prefixes, linears, strict=True):
            linear.weight.copy_(tensors[f"{prefix}.weight"])
            linear.bias.copy_(tensors[f"{prefix}.bias"])
