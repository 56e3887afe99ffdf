"""What REPORT.md says: losses, exact match, gate accuracy and entropy, agreement; and the gate's reference profile."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_builder.documents import DOMAIN_NAMES, Batch, Turn, composite, encode, pack, single
from demo_builder.generation import Generated, generate
from demo_builder.mixture import XLora
from demo_builder.training import token_losses

MIXED = "switching"
BINS = 20
RowsOf = Callable[[XLora, Batch], Tensor | None]


def held_out_sets(seed: int, per_domain: int) -> dict[str, list[Turn]]:
    """Distinct held-out questions: one set per domain, and composites of every ordered pair of domains."""
    rng = random.Random(seed)
    sets = {d: _distinct(per_domain, partial(single, d, rng, house=True, held_out=True)) for d in DOMAIN_NAMES}
    pairs = [(a, b) for a in DOMAIN_NAMES for b in DOMAIN_NAMES if a != b]
    each = max(1, per_domain // 6)
    sets[MIXED] = [t for p in pairs for t in _distinct(each, partial(composite, rng, True, True, p))]
    return sets


def _distinct(count: int, make: Callable[[], Turn]) -> list[Turn]:
    found: dict[str, Turn] = {}
    for _ in range(count * 50):
        turn = make()
        found.setdefault(turn.prompt, turn)
        if len(found) == count:
            break
    return list(found.values())


def held_out_batches(turns: list[Turn], tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """One question and answer per row."""
    documents = [encode([t], tokenizer) for t in turns]
    for start in range(0, len(documents), 32):
        chunk = documents[start : start + 32]
        yield pack([[d] for d in chunk], max(len(d.ids) for d in chunk), tokenizer.pad_token_id)


def gates(experts: list[str]) -> dict[str, RowsOf]:
    """The gate settings compared: base, each expert alone, uniform, X-LoRA."""

    def fixed(weights: list[float]) -> RowsOf:
        return lambda model, batch: model.fixed_rows(torch.tensor(weights).expand(*batch.ids.shape, -1))

    n = len(experts)
    table: dict[str, RowsOf] = {"base": lambda model, batch: None}
    table |= {name: fixed([float(i == k) for i in range(n)]) for k, name in enumerate(experts)}
    table["uniform"] = fixed([1 / n] * n)
    table["X-LoRA"] = lambda model, batch: model.scalings(batch.ids, **passes(batch))
    return table


def passes(batch: Batch) -> dict[str, Any]:
    """What both passes of a packed batch need."""
    return {"attention_mask": batch.mask, "position_ids": batch.positions}


@torch.no_grad()
def losses(
    model: XLora, sets: dict[str, list[Turn]], tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[str, float]]:
    """Mean loss per answer token in nats: gate setting -> set -> loss."""
    table: dict[str, dict[str, float]] = {}
    for gate_name, rows_of in gates(DOMAIN_NAMES).items():
        table[gate_name] = {}
        for set_name, turns in sets.items():
            total, count = 0.0, 0
            for batch in held_out_batches(turns, tokenizer):
                logits = model.logits(batch.ids, rows_of(model, batch), **passes(batch))
                total += float((token_losses(logits, batch) * batch.answers).sum())
                count += int(batch.answers.sum())
            table[gate_name][set_name] = total / count
    return table


def entropy(rows: Tensor) -> Tensor:
    """[..., S, E] -> [...]: entropy in nats of each row, mean over sites."""
    p = rows.abs() / rows.abs().sum(-1, keepdim=True)
    return -(p * p.clamp(min=1e-30).log()).sum(-1).mean(-1)


@dataclass
class GateFigures:
    """Teacher-forced figures of the gate on one set."""

    accuracy_answers: float
    accuracy_questions: float
    entropy_answers: float
    entropy_boundaries: float | None


@torch.no_grad()
def gate_figures(model: XLora, turns: list[Turn], tokenizer: PreTrainedTokenizerFast) -> GateFigures:
    """Accuracy and entropy of the gate over the true answers."""
    right: dict[bool, list[Tensor]] = {True: [], False: []}
    nats, boundary = [], []
    for batch in held_out_batches(turns, tokenizer):
        rows = model.scalings(batch.ids, **passes(batch))
        hit = rows.mean(2).argmax(-1) == batch.domains
        for part in (True, False):
            right[part].append(hit[(batch.answers == part) & (batch.domains >= 0)])
        h = entropy(rows)
        nats.append(h[batch.answers])
        previous = batch.domains.roll(1, dims=1)
        boundary.append(h[batch.answers & (previous != batch.domains) & (previous >= 0)])
    edges = torch.cat(boundary)
    return GateFigures(
        float(torch.cat(right[True]).float().mean()),
        float(torch.cat(right[False]).float().mean()),
        float(torch.cat(nats).mean()),
        float(edges.mean()) if len(edges) else None,
    )


@dataclass
class Answers:
    """Greedy answers to one set under one gate setting."""

    generated: list[Generated]
    correct: list[bool]

    @property
    def exact_match(self) -> float:
        """Share of correct answers."""
        return sum(self.correct) / len(self.correct)


def answers(
    model: XLora, turns: list[Turn], tokenizer: PreTrainedTokenizerFast, limit: int, fixed: Tensor | None = None
) -> Answers:
    """Exact match compares the whole text and asks for the end token."""
    prompts = [tokenizer.encode(t.prompt) for t in turns]
    generated = generate(model, prompts, tokenizer.eos_token_id, limit, fixed)
    texts = [tokenizer.decode(g.ids[:-1] if g.finished else g.ids) for g in generated]
    return Answers(
        generated, [g.finished and text == t.answer for g, text, t in zip(generated, texts, turns, strict=True)]
    )


def agreement(answered: list[Answers]) -> float:
    """Share of X-LoRA's greedy tokens that the scaling pass predicts at the same position."""
    generated = [g for a in answered for g in a.generated]
    return sum(g.hits for g in generated) / sum(len(g.ids) for g in generated)


def gate_profile(answered: list[Answers], experts: list[str]) -> dict[str, Any]:
    """Reference statistics of the gate over held-out prompts and X-LoRA's answers, by phase (DESIGN section 7)."""
    generated = [g for a in answered for g in a.generated]
    phases = {
        "prompt": torch.cat([g.prompt_rows for g in generated if g.prompt_rows is not None]),
        "generated": torch.stack([r for g in generated for r in g.rows]),
    }
    return {
        "description": "Gate statistics over held-out single and domain-switching questions, answered greedily. "
        "Entropy is the mean over sites divided by ln(experts). The last prompt position counts as generated.",
        "phases": {name: _profile(rows, experts) for name, rows in phases.items()},
    }


def _profile(rows: Tensor, experts: list[str]) -> dict[str, Any]:
    """rows: [N, S, E]."""
    mean = rows.mean(1)
    ratio = entropy(rows) / math.log(len(experts))
    top = torch.bincount(mean.argmax(-1), minlength=len(experts)) / len(mean)
    edges = [round(i / BINS, 4) for i in range(BINS + 1)]
    counts = torch.bincount((ratio * BINS).long().clamp(0, BINS - 1), minlength=BINS)
    return {
        "tokens": len(mean),
        "entropy_ratio": {"mean": round(float(ratio.mean()), 6), "edges": edges, "counts": counts.tolist()},
        "mean_share": {n: round(float(v), 6) for n, v in zip(experts, mean.mean(0), strict=True)},
        "top1_share": {n: round(float(v), 6) for n, v in zip(experts, top, strict=True)},
    }


@dataclass
class Results:
    """Everything measured on one bundle."""

    losses: dict[str, dict[str, float]]
    gate: dict[str, GateFigures]
    xlora: dict[str, Answers]
    base_exact: dict[str, float]
    expert_exact: dict[str, float]
    sets: dict[str, list[Turn]] = field(repr=False, default_factory=dict)

    @property
    def agreement(self) -> float:
        """Over all greedy tokens of all sets."""
        return agreement(list(self.xlora.values()))


def measure(model: XLora, tokenizer: PreTrainedTokenizerFast, seed: int, per_domain: int, limit: int = 96) -> Results:
    """Everything in the report; `limit` is the longest answer in tokens."""
    sets = held_out_sets(seed, per_domain)
    experts = torch.eye(len(DOMAIN_NAMES))
    print("[report] losses", flush=True)
    table = losses(model, sets, tokenizer)
    figures = {name: gate_figures(model, turns, tokenizer) for name, turns in sets.items()}
    print("[report] greedy answers", flush=True)
    return Results(
        losses=table,
        gate=figures,
        xlora={name: answers(model, turns, tokenizer, limit) for name, turns in sets.items()},
        base_exact={
            n: answers(model, t[:50], tokenizer, limit, torch.zeros(len(experts))).exact_match for n, t in sets.items()
        },
        expert_exact={
            n: answers(model, sets[n][:50], tokenizer, limit, experts[k]).exact_match
            for k, n in enumerate(DOMAIN_NAMES)
        },
        sets=sets,
    )
