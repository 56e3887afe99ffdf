r"""PEFT's names for the tensors of a LoRA adapter, in a file of its own and in its save of an X-LoRA model; and the
matching of rank_pattern and alpha_pattern with modules.

A pattern matches the end of a module's path (PEFT's `get_pattern_key`): `q_proj`, `layers\.(0|1)\..*_proj`. Plain names
are matched here, expressions with operators in a process with a time limit (pattern_process.py). The tensors themselves
are checked in lora.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from service.checkpoint.base import BaseModel
from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.tensors import StoredTensor, TensorFile

KINDS = r"(?P<site>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])"
TENSOR_NAME = re.compile(rf"base_model\.model\.{KINDS}(\.(?P<adapter>[^.]+))?(?(kind)|\.weight)")
# PEFT's save of an X-LoRA model writes each expert's folder under these names, among tensors of others and of the base.
XLORA_TENSOR_NAME = re.compile(rf"base_model\.lora_model\.model\.{KINDS}(?(kind)|\.weight)")
XLORA_PREFIX = "base_model.lora_model."
CLASSIFIER_PREFIX = "internal_xlora_classifier."  # the original library leaves the classifier's biases with each expert
# PEFT adds these when it adapts an embedding: harmless as long as they are the base's own.
BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight")
FOREIGN_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_A.bias": "lora_bias",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
}
MAX_SECONDS = 5
MAX_PATTERNS, MAX_CHARACTERS = 10_000, 1_000_000  # of one field, and of all its patterns together
MAX_MATCHES = 100_000  # of names with modules in this process; more are left to the other process
NAME = re.compile(r"(\w|-|\\?\.)*")  # letters, digits, hyphens and dots, escaped or not
PROCESS = Path(__file__).with_name("pattern_process.py")


def pair_names(
    file: TensorFile, base: BaseModel | None, defects: Defects, expert: str
) -> tuple[dict[str, dict[str, str]], bool]:
    """{site: {"A": tensor name, "B": tensor name}}, and whether the file is part of a saved X-LoRA model."""
    from_xlora = any(name.startswith(XLORA_PREFIX) for name in file.tensors)
    return _pair_xlora_names(file, base, expert) if from_xlora else _pair_own_names(file, base, defects), from_xlora


def _pair_own_names(file: TensorFile, base: BaseModel | None, defects: Defects) -> dict[str, dict[str, str]]:
    """{site: {"A": tensor name, "B": tensor name}}; a tensor that is neither is a defect."""
    pairs: dict[str, dict[str, str]] = {}
    copies: list[tuple[str, str]] = []  # tensors of the base, and those of the file that should equal them
    for name in file.tensors:
        if name.startswith(CLASSIFIER_PREFIX):
            continue
        match = TENSOR_NAME.fullmatch(name)
        foreign = next((what for part, what in FOREIGN_TENSORS.items() if part in name), None)
        if foreign:
            defects.add(defect(file.path, f"tensor {name!r}: {foreign} is not supported"))
        elif match is None and (own := _copied(name, base)):
            copies.append((own, name))
        elif match is None:
            expected = "expected names like 'base_model.model.<module>.lora_A.weight'"
            defects.add(defect(file.path, f"unexpected tensor {name!r}: {expected}"))
        elif match["side"] in (sides := pairs.setdefault(match["site"], {})):
            problem = f"tensors {sides[match['side']]!r} and {name!r}: expected one adapter, found several"
            defects.add(defect(file.path, problem))
        else:
            sides[match["side"]] = name
    if base is not None and copies:
        _check_copies(copies, file, base, defects)
    return pairs


def _copied(name: str, base: BaseModel | None) -> str | None:
    """The tensor of the base that is copied under this name, or None."""
    match = BASE_COPY.fullmatch(name)
    return base.weight_name(match["module"]) if match and base else None


def _check_copies(copies: Sequence[tuple[str, str]], file: TensorFile, base: BaseModel, defects: Defects) -> None:
    """Reports copies of the base's tensors that have other values, since the embedding was trained."""
    for held in base.files:
        pairs = [pair for pair in copies if pair[0] in held.tensors]
        for own, name in pairs:
            original = StoredTensor(held, held.tensors[own])[...]
            copy = StoredTensor(file, file.tensors[name])[...]
            if copy.shape != original.shape or not _is_copy(copy, original):
                problem = f"tensor {name!r}: expected a copy of the base's {list(original.shape)}, found other values"
                hint = "the embedding was trained or the vocabulary resized; merge it into the base"
                defects.add(defect(file.path, f"{problem} of shape {list(copy.shape)}", hint))


def _is_copy(copy: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether they are equal, perhaps after the base was loaded in another precision for training."""
    loaded = (original.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(copy, original.to(dtype).to(copy.dtype)) for dtype in loaded)


def _pair_xlora_names(file: TensorFile, base: BaseModel | None, expert: str) -> dict[str, dict[str, str]]:
    """Like _pair_own_names, for an expert's folder in PEFT's save of an X-LoRA model; ignores tensors of others."""
    pairs: dict[str, dict[str, str]] = {}
    shortened = _shortened_modules(base, expert)
    for name in file.tensors:
        if match := XLORA_TENSOR_NAME.fullmatch(name):
            pairs.setdefault(shortened.get(match["site"], match["site"]), {})[match["side"]] = name
    return pairs


def _shortened_modules(base: BaseModel | None, expert: str) -> dict[str, str]:
    """{a shortened name: the module}. PEFT before 0.18 removes the adapter's name from a tensor's wherever it occurs,
    and X-LoRA's adapters are numbers: for adapter "1", `layers.1.mlp` becomes `layers.mlp`, `layers.12.mlp` becomes
    `layers2.mlp`.
    """
    if base is None:
        return {}
    found: dict[str, list[str]] = {}
    for module in base.modules:
        found.setdefault(module.replace(f".{expert}", ""), []).append(module)
    modules = set(base.modules)
    return {short: own[0] for short, own in found.items() if len(own) == 1 and short not in modules}


def match_patterns(patterns: Mapping[str, Any], sites: Sequence[str], source: Path, field: str) -> dict[str, Any]:
    """{site: value of the first pattern that matches it}; sites without a match are left out.

    Raises CheckpointError for an invalid regular expression, and when matching takes longer than MAX_SECONDS.
    """
    names, values = list(patterns), list(patterns.values())
    if len(names) > MAX_PATTERNS or sum(map(len, names)) > MAX_CHARACTERS:
        expected = f"expected at most {MAX_PATTERNS:,} patterns, of {MAX_CHARACTERS:,} characters in all"
        raise defect(source, f"{field}: {expected}, found {len(names):,}, of {sum(map(len, names)):,}")
    for name in names:
        try:
            re.compile(_at_the_end(name))
        except (re.error, OverflowError, RecursionError) as error:
            raise defect(source, f"{field}: {name!r:.80} is not a regular expression: {error}") from error
    are_names = all(NAME.fullmatch(name) for name in names) and len(names) * len(sites) <= MAX_MATCHES
    found = _match_here(names, sites) if are_names else _match_in_process(names, sites, source, field)
    return {site: values[index] for site, index in zip(sites, found, strict=True) if index is not None}


def _match_here(names: Sequence[str], sites: Sequence[str]) -> list[int | None]:
    compiled = [re.compile(_at_the_end(name)) for name in names]
    return [next((i for i, pattern in enumerate(compiled) if pattern.match(site)), None) for site in sites]


def _match_in_process(names: Sequence[str], sites: Sequence[str], source: Path, field: str) -> list[int | None]:
    task = json.dumps({"patterns": [_at_the_end(name) for name in names], "sites": sites})
    command = [sys.executable, "-I", "-S", str(PROCESS), str(MAX_SECONDS)]
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=2 * MAX_SECONDS, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        problem = f"{field}: expected patterns that {len(sites)} modules are matched with in {MAX_SECONDS} s"
        hint = "write the modules' names, or patterns without a repetition inside another"
        raise defect(source, f"{problem}, found {names!r:.120}", hint) from error
    found: list[int | None] = json.loads(done.stdout)
    return found


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
