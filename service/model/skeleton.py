"""The order of the sites without the base's weights: what converting a checkpoint needs."""

from __future__ import annotations

from service.checkpoint import Checkpoint
from service.model.family import build_skeleton
from service.model.xlora_model import resolve_sites


def traversal_sites(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's sites in the order of the classifier's rows. Raises CheckpointError as loading would."""
    return resolve_sites(checkpoint, build_skeleton(checkpoint.base_path))
