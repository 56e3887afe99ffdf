"""The classifier's file -> (weight, bias) pairs, checked against XLoraConfig, the sites and the experts.

Knows how the original library and PEFT name the tensors; both are read in the numeric order of their names. Builds no
module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from service.checkpoint.activation import relu_of_original, relu_of_peft
from service.checkpoint.config import XLoraConfig
from service.checkpoint.defects import Defects, defect, shorten
from service.checkpoint.weights.tensors import TensorFile, read_tensors

CONFIG_FILE = "xlora_config.json"
WEIGHTS_FILE = "xlora_classifier.safetensors"
MAX_LISTED = 6  # names of missing layers in one message
INNER_NAME = re.compile(r"inner\.(\d{1,9})\.(weight|bias)")
PEFT_PREFIX = "base_model.internal_xlora_classifier.layers"
PEFT_NAME = re.compile(re.escape(PEFT_PREFIX) + r"\.(\d{1,9})\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class ClassifierWeights:
    """The linear layers in order, inner ones first."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]  # fp32: weight [out, in], bias [out]


@dataclass(frozen=True, slots=True)
class GateFiles:
    """Where the gate's two files lie, and how the classifier's tensors are called in them."""

    folder: str  # relative to the checkpoint
    experts: int  # E
    config: str
    weights: str
    peft_names: bool = False  # PEFT's instead of the original library's
    loss_hint: str | None = None  # PEFT: what to do when tensors are missing
    moved: Mapping[str, tuple[TensorFile, str]] = field(default_factory=dict)  # tensors to take from other files
    relu: bool | None = True  # what no enable_relu_and_dropout means, where names do not tell; None: nothing

    def names_in(self, file: TensorFile) -> list[str]:
        """The classifier's tensors, wherever they lie."""
        return [*file.tensors, *self.moved]


def layer_prefixes(file: TensorFile, config: XLoraConfig, gate: GateFiles) -> list[str]:
    """The names of the classifier's linear layers, in order. Raises CheckpointError when some are missing."""
    names = gate.names_in(file)
    return _peft_prefixes(file, names, config, gate) if gate.peft_names else _original_prefixes(file, names, config)


def has_relu(file: TensorFile, gate: GateFiles, stated: bool | None) -> bool:
    """Whether ReLU stands between the layers, by their names and by what is stated. Raises CheckpointError where these
    contradict each other, and where nothing tells.
    """
    pattern = PEFT_NAME if gate.peft_names else INNER_NAME
    numbers = _numbers(pattern, gate.names_in(file))
    if gate.peft_names:
        return relu_of_peft(numbers, stated, file.path)
    return relu_of_original(numbers, stated, gate.relu, file.path)


def read_classifier(
    file: TensorFile, config: XLoraConfig, prefixes: list[str], gate: GateFiles, sites: int | None, defects: Defects
) -> ClassifierWeights | None:
    """The classifier's weights, or None when a tensor is missing or of the wrong shape.

    `sites` is S, None when the experts could not be read: the last layer's rows are then not checked.
    """
    places = {name: (file, name) for name in file.tensors} | dict(gate.moved)
    experts = gate.experts
    expected = _expected_shapes(prefixes, config, sites, experts)
    for name in places:
        if name not in expected:
            defects.add(defect(file.path, f"unexpected tensor {name!r}", _extra_hint(name, config)))
    for name, shape in expected.items():
        if name not in places:
            hint = "use_bias is true in xlora_config.json" if name.endswith("bias") else None
            defects.add(defect(file.path, f"missing tensor {name!r}: expected shape {_shown(shape)}", hint))
            continue
        holder, key = places[name]
        found = holder.tensors[key].shape
        if len(found) != len(shape) or any(e not in (None, f) for e, f in zip(shape, found, strict=True)):
            reason = _row_reason(name, prefixes, config, sites, experts)
            problem = f"tensor {name!r}: expected shape {_shown(shape)}{reason}, found {list(found)}"
            defects.add(defect(file.path, problem))
    if any(name not in places for name in expected):
        return None
    loaded = {holder.path: read_tensors(holder) for holder, _ in places.values()}
    tensors = {name: loaded[places[name][0].path][places[name][1]].float() for name in expected}
    return ClassifierWeights(tuple((tensors[f"{p}.weight"], tensors.get(f"{p}.bias")) for p in prefixes))


def _original_prefixes(file: TensorFile, names: Iterable[str], config: XLoraConfig) -> list[str]:
    """`inner.{k}` by number (ReLU and Dropout count too, so numbers may jump), then `last`."""
    numbers = _numbers(INNER_NAME, names)
    wanted = config.xlora_depth - 1
    if len(numbers) != wanted:
        stride = 3 if all(number % 3 == 0 for number in numbers) and config.enable_relu_and_dropout else 1
        kind, number = "unexpected", numbers[-1] if numbers else 0
        if len(numbers) < wanted:
            kind, number = "missing", _absent(numbers, stride, wanted)[0]
        problem = (
            f"{kind} tensor 'inner.{number}.weight': xlora_depth {config.xlora_depth} expects {wanted} inner layers"
        )
        raise defect(file.path, f"{problem}, found {len(numbers)}")
    return [*(f"inner.{number}" for number in numbers), "last"]


def _peft_prefixes(file: TensorFile, names: Iterable[str], config: XLoraConfig, gate: GateFiles) -> list[str]:
    """`layers.{k}` by number: with ReLU between the Linears, and Dropout where it is on, k goes by 2 or 3."""
    numbers = _numbers(PEFT_NAME, names)
    if len(numbers) < config.xlora_depth:
        absent = _absent(numbers, 3 if config.xlora_dropout_p > 0 else 2, config.xlora_depth)
        missing = shorten((f"layers.{number}" for number in absent), MAX_LISTED)
        problem = f"the classifier is incomplete: xlora_depth {config.xlora_depth} expects {config.xlora_depth} layers"
        raise defect(file.path, f"{problem}, found {len(numbers)}; missing {missing}", gate.loss_hint)
    if len(numbers) > config.xlora_depth:
        problem = f"unexpected tensor 'layers.{numbers[-1]}.weight': xlora_depth {config.xlora_depth} expects"
        raise defect(file.path, f"{problem} {config.xlora_depth} layers, found {len(numbers)}")
    return [f"{PEFT_PREFIX}.{number}" for number in numbers]


def _numbers(pattern: re.Pattern[str], names: Iterable[str]) -> list[int]:
    """The layers' numbers, as numbers: 12 comes after 3."""
    return sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})


def _absent(numbers: Sequence[int], stride: int, layers: int) -> list[int]:
    """The first layers that are not there, one more of them than are listed in a message."""
    there = set(numbers)
    return list(itertools.islice((n for n in range(0, stride * layers, stride) if n not in there), MAX_LISTED + 1))


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


def _row_reason(name: str, prefixes: list[str], config: XLoraConfig, sites: int | None, experts: int) -> str:
    if not name.startswith(f"{prefixes[-1]}."):
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
