"""The demo's drafts: made by the server's own `distill`, measured here with the mathematics of this package."""

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
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import rotate_half

from demo_builder.documents import house_document
from demo_builder.evaluation import answers, held_out_sets
from demo_builder.mixture import XLora
from demo_builder.report import table
from service.checkpoint import load_checkpoint
from service.checkpoint.formats.writer import add_drafts
from service.contract.options import EngineOptions
from service.tools.distill import Distilled, Plan, distill, forwards_per_token

HEADING = "## The drafts"
HEADINGS = ("## The draft head", HEADING)  # of earlier reports, and today's


def prompts(count: int, seed: int) -> list[str]:
    """Questions as the experts were trained on, after up to five answered ones."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        turns = [turn for _ in range(rng.randint(1, 3)) for turn in house_document(rng)]
        texts.append("".join(f"{turn.prompt}{turn.answer}\n" for turn in turns[:-1]) + turns[-1].prompt)
    return texts


def teach(out: Path, tokenizer: PreTrainedTokenizerFast, seed: int, count: int, plan: Plan, work: Path) -> Distilled:
    """Gives the bundle at `out` its draft head and its draft layer; `work` is distill's folder."""
    ids = [tokenizer.encode(text) for text in prompts(count, seed)]
    options = EngineOptions(str(out), device="cpu", dtype="float32", threads=1)
    checkpoint = replace(load_checkpoint(out), draft_head=None, draft_layer=None)
    made = distill(checkpoint, options, ids, plan, work, _every_hundredth())
    add_drafts(out, made.head, made.layer)
    return made


def _every_hundredth() -> Any:
    """Prints every hundredth line of progress."""
    seen = [0]

    def show(line: str, done: int, total: int) -> None:
        seen[0] += 1
        if seen[0] % 100 == 0:
            print(f"[draft] {line}, {done} of {total}", flush=True)

    return show


@torch.no_grad()
def agreements(
    out: Path, model: XLora, tokenizer: PreTrainedTokenizerFast, seed: int, per_domain: int, limit: int
) -> tuple[list[str], list[list[str]]]:
    """A header, and a row per set of held-out questions: tokens of X-LoRA's greedy answers, the share that the scaling
    pass alone drafts right, and the shares at each depth where all before were right.
    """
    folder = out / "draft_head"
    files = (folder / "draft_head.safetensors", folder / "draft_layer.safetensors")
    head, layer = ({n: x.float() for n, x in load_file(f).items()} if f.exists() else {} for f in files)
    depth = len(layer["agreement"]) if layer else 1
    rows = []
    for name, turns in held_out_sets(seed, per_domain).items():
        written = answers(model, turns, tokenizer, limit).generated
        counts = torch.zeros(2, depth)
        for turn, generated in zip(turns, written, strict=True):
            counts += _right_and_made(model, head, layer, tokenizer.encode(turn.prompt), generated.ids)
        shares = (counts[0] / counts[1].clamp(min=1)).tolist()
        tokens = sum(len(generated.ids) for generated in written)
        alone = sum(generated.hits for generated in written) / tokens
        figures = (alone, *shares, forwards_per_token(shares))
        rows.append([name, str(tokens), *(f"{figure:.3f}" for figure in figures)])
    return ["text", "tokens", "alone", *(f"depth {i + 1}" for i in range(depth)), "forwards per token"], rows


def _right_and_made(
    model: XLora, head: dict[str, Tensor], layer: dict[str, Tensor], prompt: list[int], generated: list[int]
) -> Tensor:
    """[2, depth]: right drafts, and all drafts where those before were right, from each position before a new token."""
    tokens = torch.tensor(prompt + generated)
    cache = DynamicCache()
    hidden = model.hidden(tokens[None, :-1], None, past_key_values=cache)[0]
    anchors = torch.arange(len(prompt) - 1, len(tokens) - 1)
    state = first = hidden[anchors]
    if head:
        first = state + F.silu(state @ head["up.weight"].T + head["up.bias"]) @ head["down.weight"].T
    alive = model.base.lm_head(first).argmax(-1) == tokens[anchors + 1]
    counts = [(int(alive.sum()), len(alive))]
    for ahead in range(1, len(layer["agreement"]) if layer else 1):
        inside = anchors + ahead < len(tokens) - 1
        alive, anchors, state = alive[inside], anchors[inside], state[inside]
        state = _next_state(model, layer, cache, state, tokens[anchors + ahead], anchors, ahead)
        made = int(alive.sum())
        alive = alive & (model.base.lm_head(state).argmax(-1) == tokens[anchors + ahead + 1])
        counts.append((int(alive.sum()), made))
    return torch.tensor(counts).T


def _next_state(
    model: XLora,
    layer: dict[str, Tensor],
    cache: DynamicCache,
    state: Tensor,
    drafted: Tensor,
    anchors: Tensor,
    ahead: int,
) -> Tensor:
    """The draft layer: s of the next depth, from that before and the token just drafted, `ahead` of the anchors."""
    joined = torch.cat([state, model.base.get_input_embeddings()(drafted)], -1)
    y = joined @ layer["mix.weight"].T + layer["depths"][ahead - 1]
    normed = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    keys, values = cache.layers[-1].keys[0], cache.layers[-1].values[0]  # [kv_heads, T, head_dim], keys are turned
    kv_heads, length, head_dim = keys.shape
    query = (normed @ layer["query.weight"].T).view(len(y), kv_heads, -1, head_dim)
    cos, sin = (part[0][:, None, None] for part in model.base.model.rotary_emb(query, (anchors + ahead)[None]))
    query = query * cos + rotate_half(query) * sin
    scores = torch.einsum("nghd,gtd->nght", query, keys) / head_dim**0.5
    seen = torch.arange(length) <= anchors[:, None]
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    z = y + torch.einsum("nght,gtd->nghd", weights, values).flatten(1) @ layer["output.weight"].T
    return z + F.silu(z @ layer["up.weight"].T + layer["up.bias"]) @ layer["down.weight"].T


def add_section(report: Path, made: Distilled, measured: tuple[list[str], list[list[str]]], seconds: float) -> None:
    """Writes the report's last section, in the place of one that it has."""
    text = re.split("\n" + "|".join(f"{heading}\n" for heading in HEADINGS), report.read_text(encoding="utf-8"))[0]
    before, after = (", ".join(f"{share:.3f}" for share in shares) for shares in (made.before, made.after))
    widths = " and ".join(
        f"{len(weights.up)} wide in the {name}"
        for name, weights in (("head", made.head), ("layer", made.layer))
        if weights is not None
    )
    section = f"""
{HEADING}

`xlora-serve distill` taught them, {widths}, on {made.learned:,} positions of texts that X-LoRA wrote from questions of
the training kind, in {seconds / 60:.0f} min. In its answers to others of that kind, {made.judged:,} tokens, half of the
texts sampled, the scaling pass alone drafts what the real pass says {before} of the time; with the drafts' weights
{after}, at each depth of the drafts where all before were right: {forwards_per_token(made.after):.2f} forwards per token
(DESIGN section 3.1). On X-LoRA's greedy answers to held-out questions:

{table(*measured)}
"""
    report.write_text(text.rstrip("\n") + "\n" + section, encoding="utf-8")
