"""Computes the reference numbers of a model: by PEFT's own XLoraModel where PEFT can compute the same and memory
suffices, else by the plain two-pass computation, with the reason.

Knows PEFT's limits; peft_model.py builds its model.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from service.checkpoint import Checkpoint
from service.checkpoint.defects import one_line
from service.checkpoint.weights.lora import WEIGHTS_FILE
from service.checkpoint.weights.tensors import read_header
from service.engine.machine import free_host_bytes
from service.model.loading.quantised import Quantization
from service.tools.peft_model import PeftXLora
from service.tools.two_pass import TwoPassModel, load_causal_lm

_GIB = 1 << 30
_MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference numbers of a text, and their source."""

    logits: Tensor  # [T, V]
    scalings: Tensor  # [T, S, E], after softmax and top-k
    source: str
    note: str | None = None  # why the reference is not PEFT, or not PEFT alone


def compute_expected(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Expected:
    """Computes the whole text twice, without caches: by PEFT where possible, else by the two-pass reference."""
    reason = find_obstacle(checkpoint, device, dtype, quantization)
    if reason is None:
        on_progress("computing the same text with PEFT")
        try:
            return _by_peft(checkpoint, tokens, device, dtype)
        except Exception as error:  # PEFT and transformers have no common exception for unsupported models
            reason = f"{_peft()} cannot compute it: {_summary(error)}"
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    on_progress("computing the same text without caches, twice")
    plain = TwoPassModel(checkpoint, device=device, dtype=dtype, quantization=quantization)
    return Expected(*plain.forward(tokens), "the plain two-pass computation", f"because {reason}")


def find_obstacle(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, quantization: Quantization | None
) -> str | None:
    """Why PEFT cannot compute the same, if that is known without trying."""
    if quantization is not None:
        return f"PEFT has no base in {quantization} as it is served"
    if checkpoint.xlora.xlora_depth > 1 and not checkpoint.xlora.enable_relu_and_dropout:
        return "PEFT's classifier has ReLU between its layers, and this one has none"
    needed, free = _peft_bytes(checkpoint, dtype), _free_bytes(device)
    if needed > free:
        return f"PEFT would take {needed / _GIB:.1f} GiB of memory, and {free / _GIB:.1f} GiB are free"
    return None


def _by_peft(checkpoint: Checkpoint, tokens: Sequence[int], device: torch.device, dtype: torch.dtype) -> Expected:
    """The reference by PEFT, which reads the experts' files itself, unless it would not find all their modules."""
    note, weights = None, None
    if lost := _find_lost(checkpoint):
        note = f"which was given the experts' tensors because its loader finds no place for {lost}"
        weights = [{site: (own.a[...], own.b[...]) for site, own in one.weights.items()} for one in checkpoint.experts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT uses names that are deprecated in transformers
        model = PeftXLora(
            load_causal_lm(checkpoint.base_path, dtype).to(device),
            [expert.folder for expert in checkpoint.experts],
            checkpoint.xlora.to_dict(),
            checkpoint.classifier.layers,
            sites=checkpoint.sites,
            weights=weights,
        )
        return Expected(*model.forward(tokens), f"{_peft()}'s own XLoraModel", note)


def _find_lost(checkpoint: Checkpoint) -> str | None:
    """A tensor of the experts' files that PEFT's X-LoRA does not find a module for.

    PEFT removes parts from the front of a name until `model.` is left (forever, if that never comes), and assumes that
    every module is in the causal LM's `model`.
    """
    for expert in checkpoint.experts:
        for name in read_header(expert.folder / WEIGHTS_FILE).tensors:
            before, rest = "", name
            while "." in rest and (not rest.startswith("model.") or rest.startswith("model.model.")):
                before, _, rest = rest.partition(".")
            if before != "model" or not rest.startswith("model."):
                return f"{name!r} of expert {expert.name!r}"
    return None


def _peft_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of PEFT's model: the base, and experts in float32, one of them twice while it is read."""
    base = sum(math.prod(info.shape) for file in checkpoint.base_files for info in file.tensors.values())
    experts = [sum(w.a.shape.numel() + w.b.shape.numel() for w in one.weights.values()) for one in checkpoint.experts]
    return base * dtype.itemsize + 4 * (sum(experts) + max(experts))


def _free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def _summary(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:_MAX_REASON_CHARACTERS]


def _peft() -> str:
    try:
        return f"PEFT {version('peft')}"
    except PackageNotFoundError:
        return "PEFT"
