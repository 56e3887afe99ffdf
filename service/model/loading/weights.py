"""A base's weights from its files into its modules, a layer at a time: what stays is placed where it stays, and beside
it there is one layer at most, whatever the dtype, the device and the quantisation.

The converting is transformers' own, as in fit.py: renamings, merged experts, tied weights. Knows how transformers loads
and how tensors are called; which of them are kept in which dtype it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from service.checkpoint.base import LAYER_NUMBER
from service.checkpoint.weights.tensors import StoredTensor
from service.contract.errors import CheckpointError

REPORT_SECONDS = 2.0  # between two lines of progress


class Reading:
    """The tensors of a base as transformers asks for them, from several threads: counts bytes, and keeps what is wrong
    with a file, which transformers would make part of an account of its own.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], on_progress: Callable[[str], None]) -> None:
        self._tensors, self._on_progress = tensors, on_progress
        self._total = sum(tensor.nbytes for tensor in tensors.values())
        self._done, self._started = 0, time.monotonic()
        self._reported = self._started
        self._errors: list[CheckpointError] = []

    def layers(self) -> Iterator[dict[str, _Asked]]:
        """Tensors by layer, those of none first."""
        groups: dict[int, dict[str, _Asked]] = {}
        for name, tensor in self._tensors.items():
            found = LAYER_NUMBER.match(name)
            groups.setdefault(int(found[2]) if found else -1, {})[name] = _Asked(tensor, self._errors)
        for number in sorted(groups):
            yield groups[number]

    def finish(self, layer: Mapping[str, _Asked]) -> None:
        """Counts a layer. Raises CheckpointError for what was wrong with its tensors."""
        if self._errors:
            raise self._errors[0]
        self._done += sum(asked.stored.nbytes for asked in layer.values())
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS and self._done < self._total:
            self._reported = now
            left = (now - self._started) * (self._total - self._done) / self._done
            gigabytes = f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB"
            self._on_progress(f"loading base model: {gigabytes}, {left:.0f} s left")


class _Asked:
    """A tensor of a file that remembers what was wrong with it."""

    def __init__(self, stored: StoredTensor, errors: list[CheckpointError]) -> None:
        self.stored, self._errors = stored, errors

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self.stored[index]
        except CheckpointError as error:
            self._errors.append(error)
            raise


def place_weights(
    causal_lm: Any,
    tensors: Mapping[str, StoredTensor],
    device: torch.device,
    *,
    stays_bfloat16: Collection[str] = (),
    after_layer: Callable[[], None] = lambda: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Fills the modules of a base on the meta device with the files' tensors, on `device` and in the dtypes that the
    modules have; the weights of the linears named in `stays_bfloat16` stay as they are stored where float32 would only
    widen them. `after_layer` is called when a layer is complete. Buffers are computed, and stay on the CPU.

    Raises CheckpointError where a tensor is missing, of another shape, damaged or not finite.
    """
    for name in stays_bfloat16:
        weight = causal_lm.get_submodule(name).weight
        weight.data = weight.data.to(torch.bfloat16)
    _compute_buffers(causal_lm)
    mapping: Any = get_model_conversion_mapping(causal_lm)
    config = LoadStateDictConfig(device_map={"": device}, weight_mapping=mapping, **_dtypes(causal_lm))
    missing: set[str] | None = None
    reading = Reading(tensors, on_progress)
    for layer in reading.layers():
        found, _ = convert_and_load_state_dict_in_model(
            model=causal_lm, state_dict=layer, load_config=config, disk_offload_index=None
        )
        reading.finish(layer)
        missing = found.missing_keys if missing is None else missing & found.missing_keys
        wrong = [name for name, *_ in found.mismatched_keys] + list(found.conversion_errors)
        if wrong:
            raise CheckpointError(f"{_source(causal_lm)}: tensors that do not fit: {', '.join(sorted(wrong)[:3])}")
        after_layer()
    causal_lm.tie_weights(missing_keys=missing or set(), recompute_mapping=False)
    left = [name for name, tensor in causal_lm.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(f"{_source(causal_lm)}: missing tensors: {', '.join(sorted(left)[:3])}")


def _compute_buffers(causal_lm: Any) -> None:
    """Constants that are in no file, as RoPE's frequencies."""
    causal_lm._move_missing_keys_from_meta_to_device(set(), {"": torch.device("cpu")}, None, None)
    causal_lm._initialize_missing_keys(False)


def _dtypes(causal_lm: Any) -> dict[str, Any]:
    """The dtype of the base, and of the modules that it keeps in float32 whatever that is."""
    return {"dtype": causal_lm.dtype, "dtype_plan": causal_lm._get_dtype_plan(causal_lm.dtype)}


def _source(causal_lm: Any) -> str:
    return str(causal_lm.config.name_or_path)
