"""PEFT's own XLoraModel, built in memory from adapters on disk, for PEFT's save and load of X-LoRA lose tensors.

Knows PEFT's classes, and neither our checkpoints nor what PEFT cannot load (reference.py). PEFT is imported when a
model is built: nothing that serves needs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Layers = Sequence[tuple[Tensor, Tensor | None]]
# Fields of its XLoraConfig: the rest is names and bookkeeping.
_FIELDS = (
    *("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "softmax_temperature", "top_k_lora"),
    *("xlora_depth", "xlora_size", "xlora_dropout_p", "global_scaling_weight", "scaling_pass_value"),
)


class PeftXLora:
    """X-LoRA over a base of transformers. Slow on purpose: every call computes the whole text twice, without caches."""

    def __init__(
        self,
        base: Any,
        adapters: Sequence[Path],
        config: Mapping[str, Any],
        layers: Layers,
        sites: Sequence[str] | None = None,
    ) -> None:
        """`adapters` are folders in class order, `config` XLoraConfig's fields by name, `layers` the classifier's
        (weight, bias) pairs. `sites` is the order of its rows and of the scalings, None for PEFT's own.

        Raises ValueError where PEFT adapts other modules than `sites`, and whatever PEFT raises for what it cannot do.
        """
        from peft import XLoraConfig, get_peft_model

        base.config.use_cache = False  # PEFT insists
        places = {str(number): str(folder) for number, folder in enumerate(adapters)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = XLoraConfig(task_type="CAUSAL_LM", hidden_size=config["hidden_size"], adapters=places)
            self.model: Any = get_peft_model(base, own).eval()
        self.xlora: Any = self.model.base_model
        found = _numbered_layers(base)
        self.sites = list(found if sites is None else sites)
        if set(self.sites) != set(found):
            odd = sorted(set(self.sites) ^ set(found))
            raise ValueError(f"it adapts {len(found)} modules and not {len(self.sites)}: {', '.join(odd[:3])}")
        self.layers = [found[site] for site in self.sites]
        self.configure(config, layers)

    @property
    def classifier(self) -> nn.Module:
        """PEFT's XLoraClassifier."""
        classifier: nn.Module = self.xlora.internal_xlora_classifier
        return classifier

    def configure(self, config: Mapping[str, Any], layers: Layers) -> None:
        """Another gate over the same base and experts."""
        from peft.tuners.xlora.classifier import XLoraClassifier

        own = self.xlora.xlora_config
        for name in _FIELDS:
            if name in config:
                setattr(own, name, config[name])
        device = next(self.model.parameters()).device
        classifier = XLoraClassifier(self.model, own, len(own.adapters), len(self.layers), device)
        linears = [module for module in classifier.layers if isinstance(module, nn.Linear)]
        pairs = [(weight, torch.zeros(len(weight)) if bias is None else bias) for weight, bias in layers]
        if own.layerwise_scalings:
            pairs[-1] = self._placed(pairs[-1][0]), self._placed(pairs[-1][1])
        with torch.no_grad():
            for linear, (weight, bias) in zip(linears, pairs, strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
        self.xlora.internal_xlora_classifier = classifier.eval()
        self.xlora.set_scaling_pass_value(own.scaling_pass_value)  # null becomes 1/E here, and only here

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Returns [T, V]: the real pass over `tokens`."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        logits: Tensor = self.model(input_ids=ids).logits[0]
        return logits

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns logits [T, V] and scalings [T, S, E] after softmax and top-k: PEFT keeps those before top-k, and its
        own layers finish them.
        """
        logits = self.logits(tokens)
        before = self.xlora.internal_xlora_scalings
        return logits, torch.stack([layer.get_maybe_topk_scalings(before)[0] for layer in self.layers], dim=1)

    def _placed(self, rows: Tensor) -> Tensor:
        """Rows [S * E, ...] of the classifier's last layer, in the order in which PEFT has numbered its layers."""
        order = torch.tensor([layer.layer_number for layer in self.layers]).argsort()
        return rows.view(len(order), -1, *rows.shape[1:])[order].flatten(0, 1)


def _numbered_layers(base: nn.Module) -> dict[str, Any]:
    """{module's name: PEFT's X-LoRA layer around it}, by PEFT's number."""
    from peft.tuners.xlora.layer import XLoraLayer

    found = {name: getattr(module.forward, "__self__", None) for name, module in base.named_modules()}
    layers = {name: layer for name, layer in found.items() if isinstance(layer, XLoraLayer)}
    return dict(sorted(layers.items(), key=lambda item: item[1].layer_number))
