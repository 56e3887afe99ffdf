"""The oracle: PEFT's XLoraModel, built in memory from a bundle's files by a reading of its own.

How PEFT's model is put together is the tool's that `check --verify` uses; which files, orders and tensors go into it is
found here without our checkpoint's code, so that a mistake in reading shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from service.checkpoint import XLoraConfig
from service.tools.peft_model import PeftXLora


class PeftOracle(PeftXLora):
    """A bundle in PEFT's own classes, fp32 on the CPU."""

    def __init__(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        gate = bundle / manifest["classifier"]
        base = AutoModelForCausalLM.from_pretrained(
            bundle / manifest["base"], dtype=torch.float32, attn_implementation="eager"
        )
        super().__init__(
            base,
            [bundle / expert["path"] for expert in manifest["experts"]],
            json.loads((gate / "xlora_config.json").read_text()),
            _layers(load_file(gate / "xlora_classifier.safetensors")),
        )

    def reconfigure(self, config: XLoraConfig, layers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Same base and experts under another configuration and another classifier, without touching the disk."""
        self.configure(config.to_dict(), layers)

    def scalings(self, tokens: list[int]) -> Tensor:
        """Returns [T, S, E] after softmax and top-k."""
        return self.forward(tokens)[1]

    def greedy(self, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
        """Returns `steps` greedy tokens and, per step, the margin between the two best logits."""
        tokens, margins = list(prompt), []
        for _ in range(steps):
            best = self.logits(tokens)[-1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :], margins


def _layers(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """The classifier's tensors in numeric order, `last` last."""
    inner = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("inner.")})
    prefixes = [*(f"inner.{number}" for number in inner), "last"]
    return [(tensors[f"{prefix}.weight"], tensors.get(f"{prefix}.bias")) for prefix in prefixes]
