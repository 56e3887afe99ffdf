"""The demo's draft head: made by the server's own `distill`, measured here with the mathematics of this package."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_builder.documents import house_document
from demo_builder.evaluation import answers, held_out_sets
from demo_builder.mixture import XLora
from demo_builder.report import table
from service.checkpoint import load_checkpoint
from service.checkpoint.formats.writer import add_drafts
from service.contract.options import EngineOptions
from service.tools.distill import Distilled, distill

HEADING = "## The draft head"


def prompts(count: int, seed: int) -> list[str]:
    """Questions as the experts were trained on, after up to five answered ones."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        turns = [turn for _ in range(rng.randint(1, 3)) for turn in house_document(rng)]
        texts.append("".join(f"{turn.prompt}{turn.answer}\n" for turn in turns[:-1]) + turns[-1].prompt)
    return texts


def teach(out: Path, tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> Distilled:
    """Gives the bundle at `out` its draft head."""
    ids = [tokenizer.encode(text) for text in prompts(count, seed)]
    made = distill(
        replace(load_checkpoint(out), draft_head=None),
        EngineOptions(str(out), device="cpu", dtype="float32"),
        ids,
        max_tokens=128,
        seed=seed,
        on_progress=_every_tenth(),
    )
    add_drafts(out, made.weights, None)
    return made


def _every_tenth() -> Any:
    """Prints every tenth line of progress, and those of training."""
    seen = [0]

    def show(line: str) -> None:
        seen[0] += 1
        if seen[0] % 10 == 0 or line.startswith("training"):
            print(f"[draft] {line}", flush=True)

    return show


@torch.no_grad()
def agreements(
    out: Path, model: XLora, tokenizer: PreTrainedTokenizerFast, seed: int, per_domain: int, limit: int
) -> list[list[str]]:
    """A row per set of held-out questions: tokens of X-LoRA's greedy answers, and the shares that are drafted right."""
    head = {name: tensor.float() for name, tensor in load_file(out / "draft_head" / "draft_head.safetensors").items()}
    rows = []
    for name, turns in held_out_sets(seed, per_domain).items():
        written = answers(model, turns, tokenizer, limit).generated
        right: list[Tensor] = []
        for turn, generated in zip(turns, written, strict=True):
            prompt = tokenizer.encode(turn.prompt)
            hidden = model.hidden(torch.tensor([prompt + generated.ids[:-1]]), None)[0, len(prompt) - 1 :]
            middle = F.silu(F.linear(hidden, head["up.weight"], head["up.bias"]))
            drafts = model.base.lm_head(hidden + F.linear(middle, head["down.weight"])).argmax(-1)
            right.append(drafts == torch.tensor(generated.ids))
        alone = sum(generated.hits for generated in written) / len(torch.cat(right))
        rows.append([name, str(len(torch.cat(right))), f"{alone:.3f}", f"{float(torch.cat(right).float().mean()):.3f}"])
    return rows


def add_section(report: Path, made: Distilled, rows: list[list[str]], seconds: float) -> None:
    """Writes the report's last section, in the place of one that it has."""
    text = re.split(rf"\n{HEADING}\n", report.read_text(encoding="utf-8"))[0]
    section = f"""
{HEADING}

`xlora-serve distill` taught it, {made.weights.size} wide, on {made.positions:,} positions of texts that X-LoRA wrote
from questions of the training kind, in {seconds:.0f} s. In its answers to others of that kind, {made.judged:,} tokens,
half of the texts sampled, the scaling pass drafts what the real pass says {made.before:.3f} of the time, and with the
draft head {made.after:.3f}. On X-LoRA's greedy answers to held-out questions:

{table(["text", "tokens", "agreement a of the scaling pass", "with the draft head"], rows)}
"""
    report.write_text(text + section, encoding="utf-8")
