"""The skeleton: a base model on the meta device, without weights, for checks before weights are read.

It shows whether the base can be served, the order of its sites, and its division among ranks. `check`, `serve` and
`convert` pass `inspect_base` to `load_checkpoint`, which stores the skeleton on the Checkpoint for the loader to reuse.
Loading weights changes a model, so passes.py builds another one with `build_skeleton`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint
from service.checkpoint.base import BaseModel
from service.checkpoint.defects import naming
from service.model.loading.family import SUPPORTED, refuse_unservable
from service.model.loading.fit import refuse_misfit
from service.model.loading.parallel_plan import check_plan
from service.model.targets import resolve_sites


def inspect_base(base: BaseModel) -> Any:
    """Builds and checks the skeleton. Raises CheckpointError for a base that would not load with any weights."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # building takes milliseconds
    skeleton = build_skeleton(base.path)
    with naming(base.path / "config.json", "its weights cannot be matched with it"):
        refuse_misfit(skeleton, base)  # first: afterwards, the model's size is bounded by that of the files
    refuse_unservable(skeleton, base.path)
    return skeleton


def skeleton_of(checkpoint: Checkpoint) -> Any:
    """The skeleton of a checkpoint's base, built now unless the checkpoint has one. Raises CheckpointError for a family
    that cannot be served.
    """
    if checkpoint.skeleton is not None:
        return checkpoint.skeleton
    skeleton = build_skeleton(checkpoint.base_path)
    refuse_unservable(skeleton, checkpoint.base_path)
    return skeleton


def build_skeleton(base: Path, dtype: torch.dtype | None = None) -> Any:
    """The base's modules without weights, in `dtype` (None: the base's own). Raises CheckpointError for an architecture
    without a causal LM in transformers, and for fields of config.json that it cannot be built with.
    """
    with naming(base / "config.json", "transformers knows no causal language model for it", SUPPORTED):
        config = read_config(base)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, dtype=config.dtype if dtype is None else dtype
            )


def read_config(base: Path) -> PretrainedConfig:
    """config.json as transformers reads it, without the attention that it names: ours replaces it, and one from the hub
    would be downloaded and run.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = "eager"
    return config


def traversal_sites(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's sites in the order of the classifier's rows. Raises CheckpointError as loading would."""
    return resolve_sites(checkpoint, skeleton_of(checkpoint))


def check_divisible(checkpoint: Checkpoint, ranks: int) -> None:
    """Raises CheckpointError for a base that cannot be served, or not divided among ranks; SettingsError if it cannot
    be divided among this many.
    """
    check_plan(skeleton_of(checkpoint), ranks, checkpoint.base_path)
    traversal_sites(checkpoint)
