"""Files on disk -> Checkpoint. Knows formats and validation, builds no modules; imports neither model nor engine."""

from service.checkpoint.config import XLoraConfig
from service.checkpoint.formats.bundle import Checkpoint, Expert, load_checkpoint
from service.checkpoint.formats.writer import write_bundle
from service.checkpoint.live import export
from service.checkpoint.report import describe, find_problems
from service.checkpoint.sources import Overrides
from service.checkpoint.weights.classifier import ClassifierWeights
from service.checkpoint.weights.draft_head import DraftHeadWeights
from service.checkpoint.weights.draft_layer import DraftLayerWeights
from service.checkpoint.weights.lora import LoraWeights

__all__ = [
    "Checkpoint",
    "ClassifierWeights",
    "DraftHeadWeights",
    "DraftLayerWeights",
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
