"""The classifier's file -> (weight, bias) pairs, checked against XLoraConfig, the sites and the experts.

Knows the original library's tensor names: `inner.{k}` in numeric order, then `last`. Builds no module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from service.checkpoint.config import XLoraConfig
from service.checkpoint.defects import Defects, defect
from service.checkpoint.tensors import TensorFile, read_tensors

CONFIG_FILE = "xlora_config.json"
WEIGHTS_FILE = "xlora_classifier.safetensors"
INNER_NAME = re.compile(r"inner\.(\d+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class ClassifierWeights:
    """The linear layers in order, inner ones first."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]  # fp32: weight [out, in], bias [out]


def read_classifier(
    file: TensorFile, config: XLoraConfig, *, sites: int | None, experts: int, defects: Defects
) -> ClassifierWeights | None:
    """The classifier's weights, or None when a tensor is missing or of the wrong shape.

    `sites` is S, None when the experts could not be read: the last layer's rows are then not checked.
    """
    prefixes = _layer_prefixes(file, config, defects)
    expected = _expected_shapes(prefixes, config, sites, experts)
    extra = [name for name in file.tensors if name not in expected]
    for name in extra:
        defects.add(defect(file.path, f"unexpected tensor {name!r}", _extra_hint(name, config)))
    for name, shape in expected.items():
        found = file.tensors.get(name)
        if found is None:
            hint = "use_bias is true in xlora_config.json" if name.endswith("bias") else None
            defects.add(defect(file.path, f"missing tensor {name!r}: expected shape {_shown(shape)}", hint))
        elif len(found.shape) != len(shape) or any(e not in (None, f) for e, f in zip(shape, found.shape, strict=True)):
            reason = _row_reason(name, config, sites, experts)
            problem = f"tensor {name!r}: expected shape {_shown(shape)}{reason}, found {list(found.shape)}"
            defects.add(defect(file.path, problem))
    if any(name not in file.tensors for name in expected):
        return None
    tensors = read_tensors(file)
    biases = [tensors[f"{prefix}.bias"].float() if config.use_bias else None for prefix in prefixes]
    weights = [tensors[f"{prefix}.weight"].float() for prefix in prefixes]
    return ClassifierWeights(tuple(zip(weights, biases, strict=True)))


def _layer_prefixes(file: TensorFile, config: XLoraConfig, defects: Defects) -> list[str]:
    """`inner.{k}` by number (ReLU and Dropout count too, so numbers may jump), then `last`."""
    numbers = sorted({int(match[1]) for name in file.tensors if (match := INNER_NAME.fullmatch(name))})
    wanted = config.xlora_depth - 1
    stride = 3 if all(number % 3 == 0 for number in numbers) and config.enable_relu_and_dropout else 1
    absent = [number for number in range(0, stride * wanted, stride) if number not in numbers]
    if len(numbers) != wanted:
        kind, number = ("missing", absent[0]) if len(numbers) < wanted else ("unexpected", numbers[-1])
        problem = (
            f"{kind} tensor 'inner.{number}.weight': xlora_depth {config.xlora_depth} expects {wanted} inner layers"
        )
        raise defect(file.path, f"{problem}, found {len(numbers)}")
    return [*(f"inner.{number}" for number in numbers), "last"]


def _expected_shapes(
    prefixes: list[str], config: XLoraConfig, sites: int | None, experts: int
) -> dict[str, tuple[int | None, ...]]:
    """{tensor name: shape}; None stands for a size that is not known."""
    rows = experts if not config.layerwise_scalings else None if sites is None else sites * experts
    widths = [config.hidden_size, *[config.xlora_size] * (len(prefixes) - 1), rows]
    shapes: dict[str, tuple[int | None, ...]] = {}
    for prefix, width_in, width_out in zip(prefixes, widths[:-1], widths[1:], strict=True):
        shapes[f"{prefix}.weight"] = (width_out, width_in)
        if config.use_bias:
            shapes[f"{prefix}.bias"] = (width_out,)
    return shapes


def _row_reason(name: str, config: XLoraConfig, sites: int | None, experts: int) -> str:
    if not name.startswith("last."):
        return ""
    return f" ({sites} sites x {experts} experts)" if config.layerwise_scalings else f" ({experts} experts)"


def _extra_hint(name: str, config: XLoraConfig) -> str | None:
    if name.endswith(".bias") and not config.use_bias:
        return "use_bias is false in xlora_config.json"
    if "layers." in name:
        return "these are PEFT's names; expected 'inner.{k}.weight' and 'last.weight'"
    return None


def _shown(shape: Iterable[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
