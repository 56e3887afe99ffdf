"""Loads a base's weights layer by layer, straight to their final device and dtype, so that peak memory is the model
plus one layer.

The conversion is transformers' own, as in fit.py: renamings, merged experts, tied weights. Knows how transformers
loads, and the names of tensors; the caller decides which weights stay in bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from service.checkpoint.base import LAYER_NUMBER
from service.checkpoint.weights.tensors import StoredTensor
from service.contract.errors import CheckpointError
from service.model.freed_memory import return_freed_memory

REPORT_SECONDS = 2.0  # between lines of progress


def place_weights(
    causal_lm: Any,
    tensors: Mapping[str, StoredTensor],
    device: torch.device,
    *,
    in_bfloat16: Collection[str] = (),
    after_layer: Callable[[], None] = lambda: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Fills the modules of a base on the meta device with the files' tensors, on `device` and in the modules' dtypes,
    except that the weights of the linears `in_bfloat16` are stored in bfloat16. `after_layer` is called when a layer is
    complete. Buffers are computed, and stay on the CPU.

    Raises CheckpointError for a tensor that is missing, of another shape, damaged or not finite.
    """
    mapping: Any = get_model_conversion_mapping(causal_lm)
    config = LoadStateDictConfig(device_map={"": device}, weight_mapping=mapping, **_dtypes(causal_lm))
    for name in in_bfloat16:
        weight = causal_lm.get_submodule(name).weight
        weight.data = weight.data.to(torch.bfloat16)
    compute_buffers(causal_lm)
    missing: set[str] | None = None
    progress = _Progress(sum(tensor.nbytes for tensor in tensors.values()), on_progress)
    for layer in _by_layer(tensors):
        found, _ = convert_and_load_state_dict_in_model(
            model=causal_lm, state_dict=layer, load_config=config, disk_offload_index=None
        )
        missing = found.missing_keys if missing is None else missing & found.missing_keys
        wrong = [name for name, *_ in found.mismatched_keys] + list(found.conversion_errors)
        if wrong:
            raise CheckpointError(f"{_source(causal_lm)}: tensors that do not fit: {', '.join(sorted(wrong)[:3])}")
        after_layer()
        return_freed_memory()
        progress.add(sum(tensor.nbytes for tensor in layer.values()))
    causal_lm.tie_weights(missing_keys=missing or set(), recompute_mapping=False)
    left = [name for name, tensor in causal_lm.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(f"{_source(causal_lm)}: missing tensors: {', '.join(sorted(left)[:3])}")


def _by_layer(tensors: Mapping[str, StoredTensor]) -> list[dict[str, Any]]:
    """The tensors grouped by layer, those outside of layers first."""
    groups: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        found = LAYER_NUMBER.match(name)
        groups.setdefault(int(found[2]) if found else -1, {})[name] = tensor
    return [groups[number] for number in sorted(groups)]


class _Progress:
    """Reports loaded bytes, and the expected time for the rest."""

    def __init__(self, total: int, on_progress: Callable[[str], None]) -> None:
        self._total, self._on_progress = total, on_progress
        self._done, self._started = 0, time.monotonic()
        self._reported = self._started

    def add(self, count: int) -> None:
        """Counts bytes that have been loaded."""
        self._done += count
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS and self._done < self._total:
            self._reported = now
            left = (now - self._started) * (self._total - self._done) / self._done
            gigabytes = f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB"
            self._on_progress(f"loading base model: {gigabytes}, {left:.0f} s left")


def compute_buffers(causal_lm: Any) -> None:
    """Computes constants that are in no file, such as RoPE's frequencies."""
    causal_lm._move_missing_keys_from_meta_to_device(set(), {"": torch.device("cpu")}, None, None)
    causal_lm._initialize_missing_keys(False)


def _dtypes(causal_lm: Any) -> dict[str, Any]:
    """The base's dtype, and those of modules that it always keeps in float32."""
    return {"dtype": causal_lm.dtype, "dtype_plan": causal_lm._get_dtype_plan(causal_lm.dtype)}


def _source(causal_lm: Any) -> str:
    return str(causal_lm.config.name_or_path)
