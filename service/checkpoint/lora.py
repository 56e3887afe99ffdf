"""One PEFT LoRA adapter on disk -> LoraWeights per site, checked against the base's shapes.

Knows PEFT's adapter_config.json and tensor names. Everything in a LoraConfig that would change the result and that the
engine does not compute is refused by name; a field this file has never heard of is refused too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.checkpoint.base import BaseModel
from service.checkpoint.defects import Defects, defect, did_you_mean, shorten
from service.checkpoint.tensors import TensorFile, read_tensor, read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# fan_in_fan_out says that the base stores a weight as [in, out] (GPT-2's Conv1D); A and B are the same either way.
USED_FIELDS = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "fan_in_fan_out"}
)
# Training-time settings, bookkeeping, and what is already expressed by which tensors the file holds.
HARMLESS_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)
# These change what the adapter or the base computes: only "not used" is accepted.
REFUSED_FIELDS = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "bias",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    }
)
KNOWN_FIELDS = USED_FIELDS | HARMLESS_FIELDS | REFUSED_FIELDS | {"init_lora_weights"}
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, MiCA, LoRA-GA) change the base's weights or the forward.
KEPT_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
KINDS = r"(?P<site>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])"
TENSOR_NAME = re.compile(rf"base_model\.model\.{KINDS}(\.(?P<adapter>[^.]+))?(?(kind)|\.weight)")
# PEFT's save of an X-LoRA model writes each expert's folder under these names, among tensors of others and of the base.
XLORA_TENSOR_NAME = re.compile(rf"base_model\.lora_model\.model\.{KINDS}(?(kind)|\.weight)")
XLORA_PREFIX = "base_model.lora_model."
CLASSIFIER_PREFIX = "internal_xlora_classifier."  # the original library leaves the classifier's biases with each expert
LOSS = "PEFT 0.20 and later drop tensors when they save an X-LoRA model"
# PEFT adds these when it adapts an embedding: harmless as long as they are the base's own.
BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight")
FOREIGN_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_A.bias": "lora_bias",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
}


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One expert at one site: its update of y is `scale * b @ (a @ x)`."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [out, R]
    scale: float  # lora_alpha / R, or lora_alpha / sqrt(R) with rsLoRA
    embedding: bool = False  # of an Embedding: x is one-hot, in is the vocabulary

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


def check_adapter_config(config: Mapping[str, Any], source: Path, defects: Defects) -> None:
    """Report every field that is unknown, of the wrong type, or asks for something the engine does not compute."""
    if config.get("peft_type") != "LORA":
        defects.add(defect(source, f"peft_type: expected 'LORA', found {config.get('peft_type')!r}"))
    for name, value in config.items():
        if name not in KNOWN_FIELDS:
            hint = did_you_mean(name, KNOWN_FIELDS) or "written by a newer PEFT than 0.21?"
            defects.add(defect(source, f"unknown config key {name!r}", hint))
        elif name in REFUSED_FIELDS and value and value != "none":
            problem = f"{name}: expected {_unused(name)}, found {value!r:.80}, which is not supported"
            defects.add(defect(source, problem))
    init = config.get("init_lora_weights")
    if init not in KEPT_INITIALISATIONS:
        problem = f"init_lora_weights: expected true, false, 'gaussian', 'eva' or 'orthogonal', found {init!r:.80}"
        hint = "it changes the base's weights; save it with PEFT's path_initial_model_for_weight_conversion"
        defects.add(defect(source, problem, hint))
    _check_numbers(config, source, defects)


def read_lora_weights(
    file: TensorFile,
    config: Mapping[str, Any],
    source: Path,
    base: BaseModel | None,
    defects: Defects,
    *,
    expert: str = "NAME",
) -> dict[str, LoraWeights]:
    """{site: LoraWeights}. Shapes are checked against the base's where `base` could be read."""
    from_xlora = any(name.startswith(XLORA_PREFIX) for name in file.tensors)
    pairs = _pair_xlora_names(file) if from_xlora else _pair_names(file, base, defects)
    loss_hint = f"{LOSS}; give the expert's own folder with --expert {expert}=PATH" if from_xlora else None
    tensors = read_tensors(file)
    weights: dict[str, LoraWeights] = {}
    for site, names in pairs.items():
        with defects.guard():
            for side, other in ("AB", "BA"):
                if side not in names:
                    missing = re.sub(rf"(\.lora_(embedding_)?){other}", rf"\g<1>{side}", names[other])
                    raise defect(file.path, f"missing tensor {missing!r}")
            rank, scale = rank_and_scale(config, site, source)
            embedding = ".lora_embedding_" in names["A"]
            shape = _base_shape(base, site, file, names, embedding, config)
            _check_shapes(file, names, rank, shape, source)
            weights[site] = LoraWeights(tensors[names["A"]], tensors[names["B"]], scale, embedding)
    if not pairs:
        problem = "expected tensors '...lora_A.weight' and '...lora_B.weight', found none"
        defects.add(defect(file.path, problem, loss_hint))
    elif base is not None:
        _check_targets(set(pairs), config, file, base, defects, loss_hint)
    return weights


def rank_and_scale(config: Mapping[str, Any], site: str, source: Path) -> tuple[int, float]:
    """Rank and scale of one site; a pattern matches the end of the module path (PEFT's `get_pattern_key`)."""
    rank = _by_pattern(config.get("rank_pattern"), site, config.get("r", 8), source, "rank_pattern")
    alpha = _by_pattern(config.get("alpha_pattern"), site, config.get("lora_alpha", 8), source, "alpha_pattern")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any, source: Path, field: str) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", site):
                return value
        except re.error as error:
            raise defect(source, f"{field}: {pattern!r} is not a regular expression: {error}") from error
    return default


def _unused(name: str) -> str:
    return {"bias": "'none'"}.get(name, "false" if name.startswith(("use_", "fan_", "lora_b", "ensure_")) else "null")


def _check_numbers(config: Mapping[str, Any], source: Path, defects: Defects) -> None:
    """Ranks are positive integers, alphas finite numbers, patterns maps to them."""
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(name, False), bool):
            defects.add(defect(source, f"{name}: expected true or false, found {config[name]!r:.80}"))
    for field, pattern_field, needs_integer in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        patterns = config.get(pattern_field) or {}
        if not isinstance(patterns, dict):
            defects.add(defect(source, f"{pattern_field}: expected an object, found {patterns!r:.80}"))
            continue
        values = {field: config.get(field, 8)} | {f"{pattern_field}[{k!r}]": v for k, v in patterns.items()}
        for name, value in values.items():
            kind = int if needs_integer else int | float
            is_valid = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 1e9
            if not is_valid or (needs_integer and value < 1):
                expected = "an integer of at least 1" if needs_integer else "a number"
                defects.add(defect(source, f"{name}: expected {expected}, found {value!r:.80}"))


def _pair_names(file: TensorFile, base: BaseModel | None, defects: Defects) -> dict[str, dict[str, str]]:
    """{site: {"A": tensor name, "B": tensor name}}; a tensor that is neither is a defect."""
    pairs: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        if name.startswith(CLASSIFIER_PREFIX):
            continue
        match = TENSOR_NAME.fullmatch(name)
        foreign = next((what for part, what in FOREIGN_TENSORS.items() if part in name), None)
        if foreign:
            defects.add(defect(file.path, f"tensor {name!r}: {foreign} is not supported"))
        elif match is None and _is_copy_of_base(name, file, base, defects):
            continue
        elif match is None:
            expected = "expected names like 'base_model.model.<module>.lora_A.weight'"
            defects.add(defect(file.path, f"unexpected tensor {name!r}: {expected}"))
        elif match["side"] in (sides := pairs.setdefault(match["site"], {})):
            problem = f"tensors {sides[match['side']]!r} and {name!r}: expected one adapter, found several"
            defects.add(defect(file.path, problem))
        else:
            sides[match["side"]] = name
    return pairs


def _is_copy_of_base(name: str, file: TensorFile, base: BaseModel | None, defects: Defects) -> bool:
    """Whether the tensor is the base's own; one that has other values is a defect: the embedding was trained."""
    match = BASE_COPY.fullmatch(name)
    own = base.weight(match["module"]) if match and base else None
    if own is None:
        return False
    copy = read_tensor(file, name)
    if copy.shape != own.shape or not torch.equal(copy, own.to(copy.dtype)):
        problem = f"tensor {name!r}: expected a copy of the base's {list(own.shape)}, found other values"
        hint = "the embedding was trained or the vocabulary resized; merge it into the base"
        defects.add(defect(file.path, f"{problem} of shape {list(copy.shape)}", hint))
    return True


def _pair_xlora_names(file: TensorFile) -> dict[str, dict[str, str]]:
    """The same for an expert's folder in PEFT's save of an X-LoRA model; tensors that are not the expert's are left."""
    pairs: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        if match := XLORA_TENSOR_NAME.fullmatch(name):
            pairs.setdefault(match["site"], {})[match["side"]] = name
    return pairs


def _base_shape(
    base: BaseModel | None,
    site: str,
    file: TensorFile,
    names: Mapping[str, str],
    embedding: bool,
    config: Mapping[str, Any],
) -> tuple[int, ...] | None:
    """[out, in] of the base's module, None when the base could not be read.

    Conv1D and Embedding store their weight as [in, out]. fan_in_fan_out speaks for the last module that PEFT saw, so
    both orientations are taken with it; the model checks again, where the modules are known.
    """
    name = names["A"]
    if base is None:
        return None
    shape = base.weight_shape(site)
    if shape is None:
        hint = did_you_mean(site, base.modules) or "the adapter was trained on another base"
        raise defect(file.path, f"tensor {name!r}: the base has no module {site!r}", hint)
    if len(shape) != 2:
        raise defect(file.path, f"tensor {name!r}: expected a linear module, found {site!r} of shape {list(shape)}")
    found = (file.tensors[names["B"]].shape[0], file.tensors[name].shape[-1])
    may_be_transposed = embedding or (config.get("fan_in_fan_out") is True and found != shape)
    return shape[::-1] if may_be_transposed else shape


def _check_shapes(
    file: TensorFile, names: Mapping[str, str], rank: int, base_shape: tuple[int, ...] | None, source: Path
) -> None:
    """A is [R, in] and B is [out, R]; with an unknown base only R is checked."""
    shapes = {side: file.tensors[names[side]].shape for side in "AB"}
    for side, found in shapes.items():
        rank_axis = 0 if side == "A" else 1
        if len(found) == 2 and found[rank_axis] != rank:
            problem = f"tensor {names[side]!r}: expected rank {rank} from {source.name}"
            raise defect(file.path, f"{problem}, found {found[rank_axis]} (shape {list(found)})")
        width = base_shape[1 - rank_axis] if base_shape else found[1 - rank_axis] if len(found) == 2 else "any"
        expected = (rank, width) if side == "A" else (width, rank)
        if found != expected:
            problem = f"tensor {names[side]!r}: expected shape {list(expected)}, found {list(found)}"
            raise defect(file.path, problem, "the adapter was trained on another base")


def _check_targets(
    found: set[str],
    config: Mapping[str, Any],
    file: TensorFile,
    base: BaseModel,
    defects: Defects,
    loss_hint: str | None,
) -> None:
    """Modules that `target_modules` lists but the file has no tensors for; only where the list alone decides."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    suffixes = tuple(f".{target}" for target in targets if isinstance(target, str))
    missing = [module for module in base.modules if f".{module}".endswith(suffixes) and module not in found]
    missing = [module for module in missing if not any(site.endswith(f".{module}") for site in found)]
    if missing:
        problem = f"missing tensors for {shorten(missing)}, which target_modules {sorted(map(str, targets))} names"
        defects.add(defect(file.path, problem, loss_hint))
