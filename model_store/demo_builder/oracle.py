"""Checks the bundle's mathematics against PEFT's own `XLoraModel`, built in memory from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from demo_builder.documents import DOMAIN_NAMES
from demo_builder.mixture import XLora


@torch.no_grad()
def difference_from_peft(out: Path, model: XLora, prompts: list[list[int]]) -> float:
    """Largest absolute difference of logits over the prompts, fp32."""
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.shape.hidden,
        # PEFT wants adapters named by number.
        adapters={str(i): str(out / "experts" / name) for i, name in enumerate(DOMAIN_NAMES)},
        layerwise_scalings=True,
        xlora_depth=2,
        xlora_size=model.shape.gate_size,
        xlora_dropout_p=0.0,
    )
    peft: Any = get_peft_model(base, config)
    peft.eval()
    ours = [*model.classifier.inner, model.classifier.last]
    theirs = [m for m in peft.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    for source, target in zip(ours, theirs, strict=True):
        assert isinstance(source, nn.Linear)
        target.load_state_dict(source.state_dict())
    worst = 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected = peft(input_ids=ids).logits
        worst = max(worst, float((model.logits(ids, model.scalings(ids)) - expected).abs().max()))
    return worst
