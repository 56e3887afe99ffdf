"""How PEFT calls the tensors of one LoRA adapter: in a file of its own, and in its save of an X-LoRA model.

Knows names, and which tensors beside an adapter's are harmless. What the tensors must be is lora.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from service.checkpoint.base import BaseModel
from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.tensors import TensorFile, iterate_tensors

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


def pair_names(file: TensorFile, base: BaseModel | None, defects: Defects) -> tuple[dict[str, dict[str, str]], bool]:
    """{site: {"A": tensor name, "B": tensor name}}, and whether the file is part of a saved X-LoRA model."""
    from_xlora = any(name.startswith(XLORA_PREFIX) for name in file.tensors)
    return _pair_xlora_names(file) if from_xlora else _pair_own_names(file, base, defects), from_xlora


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
    """A copy of the base's tensor that has other values is a defect: the embedding was trained."""
    for held in base.files:
        pairs = [pair for pair in copies if pair[0] in held.tensors]
        originals = iterate_tensors(held, [own for own, _ in pairs])
        found = iterate_tensors(file, [name for _, name in pairs])
        for (_, original), (name, copy) in zip(originals, found, strict=True):
            if copy.shape != original.shape or not torch.equal(copy, original.to(copy.dtype)):
                problem = f"tensor {name!r}: expected a copy of the base's {list(original.shape)}, found other values"
                hint = "the embedding was trained or the vocabulary resized; merge it into the base"
                defects.add(defect(file.path, f"{problem} of shape {list(copy.shape)}", hint))


def _pair_xlora_names(file: TensorFile) -> dict[str, dict[str, str]]:
    """The same for an expert's folder in PEFT's save of an X-LoRA model; tensors that are not the expert's are left."""
    pairs: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        if match := XLORA_TENSOR_NAME.fullmatch(name):
            pairs.setdefault(match["site"], {})[match["side"]] = name
    return pairs
