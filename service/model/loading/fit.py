"""Checks that a base's tensors match its config.json, by their names and shapes.

The matching is transformers' own, with its renamings, merged experts and tied weights, run on the meta device, where
tensors have no values. Knows how transformers loads; reads no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from service.checkpoint.base import INDEX_FILE, SINGLE_FILE, BaseModel
from service.checkpoint.defects import defect, shorten


def refuse_misfit(skeleton: Any, base: BaseModel) -> None:
    """Raises CheckpointError for a tensor that is missing, or has another shape than in `skeleton`: transformers would
    fill it with random numbers. `skeleton` is on the meta device; its parameters are replaced by equal ones.
    """
    weights = base.path / (SINGLE_FILE if base.files[0].path.name == SINGLE_FILE else INDEX_FILE)
    found = _load(skeleton, {name: torch.empty(shape, device="meta") for name, shape in base.shapes.items()})
    for name, shape, expected in sorted(found.mismatched_keys):
        problem = f"tensor {name!r}: expected shape {list(expected)} as config.json has it, found {list(shape)}"
        raise defect(weights, problem)
    for name, trace in found.conversion_errors.items():
        raise _unconverted(weights, name, trace)
    if found.missing_keys:
        raise defect(weights, f"missing tensors {shorten(sorted(found.missing_keys))}, which config.json expects")


def _load(skeleton: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' report on loading these tensors; the steps are those of its from_pretrained."""
    mapping: Any = get_model_conversion_mapping(skeleton)
    config = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping, dtype=skeleton.dtype)
    found, _ = convert_and_load_state_dict_in_model(
        model=skeleton, state_dict=tensors, load_config=config, disk_offload_index=None
    )
    skeleton.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    skeleton._adjust_missing_and_unexpected_keys(found)
    return found


def _unconverted(weights: Path, name: str, trace: str) -> Exception:
    reason = next((line for line in reversed(trace.splitlines()) if "Error: " in line and "Ckpt" not in line), "")
    return defect(weights, f"the tensors that make {name!r} do not fit together: {reason:.200}")
