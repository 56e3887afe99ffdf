"""The base's modules without its weights: enough to know the order of the sites.

Knows transformers' configuration and the meta device; reads no weight file.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.checkpoint import Checkpoint
from service.model.xlora_model import resolve_sites


def traversal_sites(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's sites in the order of the classifier's rows. Raises CheckpointError as loading would."""
    config = AutoConfig.from_pretrained(checkpoint.base_path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return resolve_sites(checkpoint, causal_lm)
