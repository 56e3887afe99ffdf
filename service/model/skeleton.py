"""What can be said of a base without its weights: the order of its sites, and whether it can be divided among ranks."""

from __future__ import annotations

from service.checkpoint import Checkpoint
from service.model.family import build_skeleton, refuse_unsupported
from service.model.parallel_plan import check_plan
from service.model.rope import refuse_length_dependent_rope
from service.model.xlora_model import resolve_sites


def traversal_sites(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's sites in the order of the classifier's rows. Raises CheckpointError as loading would."""
    return resolve_sites(checkpoint, build_skeleton(checkpoint.base_path))


def check_divisible(checkpoint: Checkpoint, ranks: int) -> None:
    """Raises CheckpointError where the base cannot be divided among ranks, or not served at all; SettingsError where it
    cannot be divided among so many.
    """
    skeleton = build_skeleton(checkpoint.base_path)
    refuse_length_dependent_rope(skeleton.config, str(checkpoint.base_path))
    refuse_unsupported(skeleton, checkpoint.base_path)
    check_plan(skeleton, ranks, checkpoint.base_path)
    resolve_sites(checkpoint, skeleton)
