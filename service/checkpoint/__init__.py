"""Files on disk -> Checkpoint. Knows formats and validation, builds no modules; imports neither model nor engine."""

from service.checkpoint.config import XLoraConfig
from service.checkpoint.formats.bundle import (
    Checkpoint,
    ClassifierWeights,
    DraftHeadWeights,
    Expert,
    LoraWeights,
    load_checkpoint,
)
from service.checkpoint.formats.writer import write_bundle
from service.checkpoint.live import export
from service.checkpoint.report import describe, find_problems
from service.checkpoint.sources import Overrides

__all__ = [
    "Checkpoint",
    "ClassifierWeights",
    "DraftHeadWeights",
    "Expert",
    "LoraWeights",
    "Overrides",
    "XLoraConfig",
    "describe",
    "export",
    "find_problems",
    "load_checkpoint",
    "write_bundle",
]
