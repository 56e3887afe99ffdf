"""What can be said of a base without its weights: whether it can be served, the order of its sites, its division."""

from __future__ import annotations

from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint
from service.checkpoint.base import BaseModel
from service.checkpoint.defects import naming
from service.model.loading.family import build_skeleton, checked_skeleton, refuse_unservable
from service.model.loading.fit import refuse_misfit
from service.model.loading.parallel_plan import check_plan
from service.model.xlora_model import resolve_sites


def check_base(base: BaseModel) -> None:
    """Raises CheckpointError for a base that would not load, whatever its weights are. `check` and `serve` both ask
    this, as `inspect_base` of the checkpoint.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of a load that takes milliseconds
    skeleton = build_skeleton(base.path)
    with naming(base.path / "config.json", "its weights cannot be matched with it"):
        refuse_misfit(skeleton, base)  # first: what fits the weights is of no unbounded size
    refuse_unservable(skeleton, base.path)


def traversal_sites(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's sites in the order of the classifier's rows. Raises CheckpointError as loading would."""
    return resolve_sites(checkpoint, checked_skeleton(checkpoint.base_path))


def check_divisible(checkpoint: Checkpoint, ranks: int) -> None:
    """Raises CheckpointError where the base cannot be divided among ranks, or not served at all; SettingsError where it
    cannot be divided among so many.
    """
    skeleton = checked_skeleton(checkpoint.base_path)
    check_plan(skeleton, ranks, checkpoint.base_path)
    resolve_sites(checkpoint, skeleton)
