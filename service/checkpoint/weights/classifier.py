"""Reads the gate's two files: its configuration and the classifier's (weight, bias) pairs, checked against the base,
the sites and the experts.

Knows the tensor names of the original library and of PEFT; layers are read in the numeric order of their names. Both
libraries number ReLU and Dropout, too, so the numbers of the Linears show whether ReLU is between them. A single inner
layer has no other to be compared with, so it needs a statement. A gate that is read the wrong way gives scalings that
look plausible and are wrong by up to 1. Builds no module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from service.checkpoint.base import BaseModel
from service.checkpoint.config import XLoraConfig, warn_of_unused
from service.checkpoint.defects import Defects, defect, shorten
from service.checkpoint.formats.manifest import GateFiles, Manifest
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import StoredTensor, TensorFile, read_header
from service.checkpoint.weights.weight_files import WeightFiles

MAX_LISTED = 6  # names of layers in one message
INNER_NAME = re.compile(r"inner\.(\d{1,9})\.(weight|bias)")
PEFT_PREFIX = "base_model.internal_xlora_classifier.layers"
PEFT_NAME = re.compile(re.escape(PEFT_PREFIX) + r"\.(\d{1,9})\.(weight|bias)")
FIELD = "enable_relu_and_dropout"
FLAG = "--gate-relu"

RELU_AND_DROPOUT = "with ReLU and Dropout between the layers"
NOTHING = "with nothing between the layers"


@dataclass(frozen=True, slots=True)
class ClassifierWeights:
    """The linear layers in order, inner ones first."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]  # fp32: weight [out, in], bias [out]


def layer_prefixes(file: TensorFile, config: XLoraConfig, gate: GateFiles) -> list[str]:
    """The names of the classifier's linear layers, in order. Raises CheckpointError when some are missing."""
    names = gate.names_in(file)
    return _peft_prefixes(file, names, config, gate) if gate.peft_names else _original_prefixes(file, names, config)


def has_relu(file: TensorFile, gate: GateFiles, stated: bool | None) -> bool:
    """Whether ReLU is between the layers, by their names and by the statement. Raises CheckpointError if these
    contradict each other, and if neither decides it.
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
    stored = {name: StoredTensor(holder, holder.tensors[key]) for name, (holder, key) in places.items()}
    tensors = {name: stored[name][...].float() for name in expected}
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
    """The layers' numbers in numeric order: 12 comes after 3."""
    return sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})


def _absent(numbers: Sequence[int], stride: int, layers: int) -> list[int]:
    """The first missing layers, one more of them than a message lists."""
    there = set(numbers)
    return list(itertools.islice((n for n in range(0, stride * layers, stride) if n not in there), MAX_LISTED + 1))


def _expected_shapes(
    prefixes: list[str], config: XLoraConfig, sites: int | None, experts: int
) -> dict[str, tuple[int | None, ...]]:
    """{tensor name: shape}; None stands for an unknown size."""
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


def relu_of_original(numbers: Sequence[int], stated: bool | None, default: bool | None, file: Path) -> bool:
    """Whether a classifier with names `inner.{k}` has ReLU: Linear, ReLU and Dropout make k go by 3, Linears alone by
    1. `last` has no number.

    `default` is the meaning of a missing statement if the names do not decide it, None if it has none. Raises
    CheckpointError for names that fit neither, for a statement that contradicts them, and for one inner layer without a
    statement.
    """
    told = _told_by(numbers, {3: True, 1: False}, "inner", file)
    relu = told if stated is None else stated
    if told is not None and relu != told:
        raise _contradiction("inner", numbers, told, file)
    if relu is not None:
        return relu
    if default is None and numbers:
        problem = f"{FIELD}: expected in xlora_config.json, for one inner layer's name does not tell"
        hint = (
            f"say whether the gate was trained with ReLU: {FLAG} true, or false (the library's default until 2024-04)"
        )
        raise defect(file, problem, hint)
    return True if default is None else default


def relu_of_peft(numbers: Sequence[int], stated: bool | None, file: Path) -> bool:
    """Checks PEFT's names `layers.{k}`: Linear, ReLU, perhaps Dropout make k go by 2 or by 3. There is always ReLU."""
    _told_by(numbers, {3: True, 2: True}, "layers", file)
    if stated is False and len(numbers) > 1:
        raise _contradiction("layers", numbers, True, file)
    return True


def _told_by(numbers: Sequence[int], strides: dict[int, bool], prefix: str, file: Path) -> bool | None:
    """The meaning of the distance between the numbers; None for a single one."""
    distances = {after - before for before, after in itertools.pairwise(numbers)}
    allowed = set(strides)
    if numbers and (numbers[0] != 0 or len(distances) > 1 or not distances <= allowed):
        ways = " or ".join(f"{prefix}.0, {prefix}.{stride}, ..." for stride in sorted(allowed))
        raise defect(
            file, f"expected layers called {ways}, found {_listed(prefix, numbers)}", "is one of them missing?"
        )
    return strides[distances.pop()] if distances else None


def _contradiction(prefix: str, numbers: Sequence[int], told: bool, file: Path) -> Exception:
    problem = f"the layers {_listed(prefix, numbers)} are numbered {RELU_AND_DROPOUT if told else NOTHING}"
    hint = f"if the names are right, set it to {str(told).lower()}, or say {FLAG} {str(told).lower()}"
    return defect(file, f"{problem}, and {FIELD} is {str(not told).lower()}", hint)


def _listed(prefix: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{prefix}.{number}" for number in numbers[:MAX_LISTED])
    return shown if len(numbers) <= MAX_LISTED else f"{shown}, ..."


@dataclass(frozen=True, slots=True)
class OpenGate:
    """The part of the gate that can be read before the experts."""

    config: XLoraConfig
    file: TensorFile
    prefixes: list[str]  # of the classifier's tensors, in the order of its layers


def open_gate(
    root: BundleRoot,
    manifest: Manifest,
    base: BaseModel | None,
    files: WeightFiles,
    relu: bool | None,
    defects: Defects,
) -> OpenGate:
    """The gate of a checkpoint. `relu` is the operator's statement about its layers; None: the files decide."""
    gate = manifest.gate
    folder = root.folder(gate.folder, manifest.source, "classifier")
    source = folder / gate.config
    data = root.json(source)
    config = _check_xlora_config(data, source, manifest, base, defects)
    file = read_header(root.weights(folder, gate.weights))
    files.add(f"classifier/{file.path.name}", file)
    prefixes = layer_prefixes(file, config, gate)
    relu = has_relu(file, gate, data.get("enable_relu_and_dropout") if relu is None else relu)
    return OpenGate(replace(config, enable_relu_and_dropout=relu), file, prefixes)


def _check_xlora_config(
    data: Mapping[str, Any], source: Path, manifest: Manifest, base: BaseModel | None, defects: Defects
) -> XLoraConfig:
    known = {
        name: value
        for name, value in data.items()
        if XLoraConfig.knows(name) or not warn_of_unused(name, value, source, defects)
    }
    config = XLoraConfig.from_dict(known, source)
    if base is not None and base.hidden_size not in (None, config.hidden_size):
        problem = f"hidden_size: expected {base.hidden_size} as in {base.path / 'config.json'}"
        defects.add(defect(source, f"{problem}, found {config.hidden_size}"))
        config = replace(config, hidden_size=base.hidden_size or config.hidden_size)  # for the classifier's shapes
    experts = manifest.expert_count
    if config.top_k_lora is not None and config.top_k_lora > experts:
        problem = f"top_k_lora: expected at most {experts}, the number of experts, found {config.top_k_lora}"
        defects.add(defect(source, problem))
    return config
