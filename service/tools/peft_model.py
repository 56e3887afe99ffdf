"""Builds PEFT's own XLoraModel in memory from adapters, because PEFT's save and load of X-LoRA lose tensors.

Knows PEFT's classes; knows neither our checkpoints nor PEFT's limits (reference.py). PEFT is imported when a model is
built, because a server does not need it.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from service.checkpoint.weights.lora import CONFIG_FILE, WEIGHTS_FILE

Layers = Sequence[tuple[Tensor, Tensor | None]]
Weights = Mapping[str, tuple[Tensor, Tensor]]  # of one adapter, by site: A, B
# The fields of PEFT's XLoraConfig that change results; the others are names and bookkeeping.
_FIELDS = (
    *("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "softmax_temperature", "top_k_lora"),
    *("xlora_depth", "xlora_size", "xlora_dropout_p", "global_scaling_weight", "scaling_pass_value"),
)


class PeftXLora:
    """PEFT's X-LoRA over a base. Slow on purpose: every call computes the whole text twice, without caches."""

    def __init__(
        self,
        base: Any,
        adapters: Sequence[Path],
        config: Mapping[str, Any],
        layers: Layers,
        *,
        sites: Sequence[str] | None = None,
        weights: Sequence[Weights] | None = None,
    ) -> None:
        """`adapters` are folders in class order, `config` XLoraConfig's fields by name, `layers` the classifier's
        (weight, bias) pairs. `sites` is the order of its rows and of the scalings, None for PEFT's own. With `weights`
        PEFT reads the adapters' configurations alone.

        Raises ValueError where PEFT adapts other modules than those, and whatever PEFT raises for what it cannot do.
        """
        base.config.use_cache = False  # PEFT insists
        with tempfile.TemporaryDirectory() as folder:
            places = adapters if weights is None else _without_weights(adapters, Path(folder))
            self.model: Any = _build(base, places, config["hidden_size"])
        self.xlora: Any = self.model.base_model
        found = _numbered_layers(base)
        for number, tensors in enumerate(weights or ()):
            _fill(found, str(number), tensors)
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
        """Replaces the gate, over the same base and experts."""
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


def _build(base: Any, adapters: Sequence[Path], hidden_size: int) -> Any:
    from peft import XLoraConfig, get_peft_model

    places = {str(number): str(folder) for number, folder in enumerate(adapters)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden_size, adapters=places)
        return get_peft_model(base, config).eval()


def _without_weights(adapters: Sequence[Path], folder: Path) -> list[Path]:
    """Copies of the adapters' configurations with empty weight files, for which PEFT creates layers and fills none."""
    copies = [folder / str(number) for number in range(len(adapters))]
    for adapter, copy in zip(adapters, copies, strict=True):
        copy.mkdir()
        shutil.copyfile(adapter / CONFIG_FILE, copy / CONFIG_FILE)
        save_file({}, copy / WEIGHTS_FILE)
    return copies


@torch.no_grad()
def _fill(layers: Mapping[str, Any], adapter: str, tensors: Weights) -> None:
    """Copies one adapter's A and B into PEFT's layers."""
    targets = {site: layer.target for site, layer in layers.items()}
    own = {site for site, one in targets.items() if adapter in one.lora_A or adapter in one.lora_embedding_A}
    if own != set(tensors):
        odd = sorted(own ^ set(tensors))
        raise ValueError(f"it adapts {len(own)} modules and not {len(tensors)}: {', '.join(odd[:3])}")
    for site, (a, b) in tensors.items():
        target = targets[site]
        if adapter in target.lora_A:
            target.lora_A[adapter].weight.copy_(a)
            target.lora_B[adapter].weight.copy_(b)
        else:
            target.lora_embedding_A[adapter].copy_(a)
            target.lora_embedding_B[adapter].copy_(b)


def _numbered_layers(base: nn.Module) -> dict[str, Any]:
    """{module's name: PEFT's X-LoRA layer around it}, by PEFT's number."""
    from peft.tuners.xlora.layer import XLoraLayer

    found = {name: getattr(module.forward, "__self__", None) for name, module in base.named_modules()}
    layers = {name: layer for name, layer in found.items() if isinstance(layer, XLoraLayer)}
    return dict(sorted(layers.items(), key=lambda item: item[1].layer_number))
