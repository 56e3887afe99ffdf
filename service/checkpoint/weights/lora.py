"""Reads a PEFT LoRA adapter into LoraWeights per site, checked against the base's shapes.

Knows PEFT's adapter_config.json and tensor names. Fields of a LoraConfig that would change the result, and that the
engine does not support, are refused by name; so are unknown fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from service.checkpoint.base import BaseModel
from service.checkpoint.config import warn_of_unused
from service.checkpoint.defects import Defects, defect, did_you_mean, shorten
from service.checkpoint.weights.lora_names import match_patterns, pair_names
from service.checkpoint.weights.tensors import StoredTensor, TensorFile

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
LOSS = "PEFT 0.20 and later drop tensors when they save an X-LoRA model"


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One expert at one site: its update of y is `scale * b @ (a @ x)`. `a[...]` and `b[...]` read the file."""

    a: torch.Tensor | StoredTensor  # [R, in]
    b: torch.Tensor | StoredTensor  # [out, R]
    scale: float  # lora_alpha / R, or lora_alpha / sqrt(R) with rsLoRA
    embedding: bool = False  # of an Embedding: x is one-hot, in is the vocabulary

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def loaded(self, device: torch.device, dtype: torch.dtype) -> LoraWeights:
        """The weights in memory, on `device` in `dtype`."""
        return replace(self, a=self.a[...].to(device, dtype), b=self.b[...].to(device, dtype))


def check_adapter_config(config: Mapping[str, Any], source: Path, defects: Defects) -> None:
    """Reports every field that is unknown, of the wrong type, or not supported by the engine."""
    if config.get("peft_type") != "LORA":
        defects.add(defect(source, f"peft_type: expected 'LORA', found {config.get('peft_type')!r}"))
    for name, value in config.items():
        if name not in KNOWN_FIELDS:
            if warn_of_unused(name, value, source, defects):
                continue
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
    """{site: LoraWeights}, empty if there is a defect. Shapes are checked against those of `base`, if known.

    `expert` is the adapter's name, which some saves remove from tensor names.
    """
    pairs, from_xlora = pair_names(file, base, defects, expert)
    loss_hint = f"{LOSS}; give the expert's own folder with --expert {expert}=PATH" if from_xlora else None
    settings = ranks_and_scales(config, list(pairs), source)
    errors_before = len(defects.errors)
    for site, names in pairs.items():
        with defects.guard():
            for side, other in ("AB", "BA"):
                if side not in names:
                    missing = re.sub(rf"(\.lora_(embedding_)?){other}", rf"\g<1>{side}", names[other])
                    raise defect(file.path, f"missing tensor {missing!r}")
            shape = _base_shape(base, site, file, names, _is_embedding(names), config)
            _check_shapes(file, names, settings[site][0], shape, source)
    if not pairs:
        problem = "expected tensors '...lora_A.weight' and '...lora_B.weight', found none"
        defects.add(defect(file.path, problem, loss_hint))
    elif base is not None:
        _check_targets(set(pairs), config, file, base, defects, loss_hint)
    if len(defects.errors) > errors_before:
        return {}
    tensors = {name: StoredTensor(file, info) for name, info in file.tensors.items()}
    return {
        site: LoraWeights(tensors[names["A"]], tensors[names["B"]], settings[site][1], _is_embedding(names))
        for site, names in pairs.items()
    }


def _is_embedding(names: Mapping[str, str]) -> bool:
    return ".lora_embedding_" in names["A"]


def ranks_and_scales(config: Mapping[str, Any], sites: Sequence[str], source: Path) -> dict[str, tuple[int, float]]:
    """{site: (rank, scale)}. Raises CheckpointError for patterns that cannot be matched."""
    ranks = match_patterns(config.get("rank_pattern") or {}, sites, source, "rank_pattern")
    alphas = match_patterns(config.get("alpha_pattern") or {}, sites, source, "alpha_pattern")
    found = {}
    for site in sites:
        rank, alpha = ranks.get(site, config.get("r", 8)), alphas.get(site, config.get("lora_alpha", 8))
        found[site] = (rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    return found


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


def _base_shape(
    base: BaseModel | None,
    site: str,
    file: TensorFile,
    names: Mapping[str, str],
    embedding: bool,
    config: Mapping[str, Any],
) -> tuple[int, ...] | None:
    """[out, in] of the base's module; None when the base could not be read.

    Conv1D and Embedding store their weight as [in, out]. fan_in_fan_out is that of the last module that PEFT saw (false
    for GPT-2's Conv1D if lm_head is adapted as well), so both orientations are accepted here; the model, which knows
    the modules, checks again.
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
    may_be_transposed = embedding or found == shape[::-1] or (config.get("fan_in_fan_out") is True and found != shape)
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
    """Reports modules that `target_modules` lists but the file has no tensors for, if no other field restricts them."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    wanted = {target for target in targets if isinstance(target, str)}
    adapted = {end for site in found for end in _ends(site)}  # some saves of a base leave out the first component
    adapted |= {str(base.weight_name(site)).removesuffix(".weight") for site in found}
    missing = [module for module in base.modules if module not in adapted and not wanted.isdisjoint(_ends(module))]
    if missing:
        problem = f"missing tensors for {shorten(missing)}, which target_modules {sorted(wanted)!r:.400} names"
        defects.add(defect(file.path, problem, loss_hint))


def _ends(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]
