"""Turns `Results` into REPORT.md, bars included, and picks the examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from demo_builder.documents import DOMAIN_NAMES
from demo_builder.evaluation import MIXED, Results

PURE_MARGIN = 1.10
"""X-LoRA's loss on pure text may be this much of the right expert's."""


@dataclass(frozen=True)
class Bar:
    """One thing the demo must show."""

    text: str
    measured: str
    holds: bool


def bars(r: Results) -> list[Bar]:
    """The bars of the demo, judged."""
    loss = r.losses
    best = [min(DOMAIN_NAMES, key=lambda e, d=d: loss[e][d]) == d for d in DOMAIN_NAMES]  # type: ignore[misc]
    margin = min(min(loss[e][d] for e in loss if e not in (d, "X-LoRA")) / loss[d][d] for d in DOMAIN_NAMES)
    rivals = {k: v[MIXED] for k, v in loss.items() if k != "X-LoRA"}
    rival = min(rivals, key=lambda k: rivals[k])
    ratios = {d: loss["X-LoRA"][d] / loss[d][d] for d in DOMAIN_NAMES}
    exact = {d: r.xlora[d].exact_match for d in DOMAIN_NAMES}
    accuracy = {n: f.accuracy_answers for n, f in r.gate.items()}
    return [
        Bar(
            "every expert clearly best on its own domain",
            f"next best has {margin:.1f} times the loss",
            all(best) and margin >= 1.5,
        ),
        Bar(
            "X-LoRA best on switching text",
            f"{loss['X-LoRA'][MIXED]:.4f} against {rivals[rival]:.4f} ({rival})",
            loss["X-LoRA"][MIXED] < rivals[rival],
        ),
        Bar(
            "X-LoRA within 10 % of the right expert on pure text",
            ", ".join(f"{d} {v - 1:+.1%}" for d, v in ratios.items()),
            max(ratios.values()) <= PURE_MARGIN,
        ),
        Bar(
            "gate accuracy at least 0.9 on answers",
            ", ".join(f"{n} {v:.3f}" for n, v in accuracy.items()),
            min(accuracy.values()) >= 0.9,
        ),
        Bar(
            "exact match at least 0.8 per domain",
            ", ".join(f"{d} {v:.3f}" for d, v in exact.items()),
            min(exact.values()) >= 0.8,
        ),
        Bar("agreement a at least 0.7", f"{r.agreement:.3f}", r.agreement >= 0.7),
    ]


def examples(r: Results, per_domain: int = 6, switching: int = 8) -> list[dict[str, str]]:
    """Held-out questions answered correctly, spread over each set."""
    chosen = []
    for name, turns in r.sets.items():
        right = [t for t, ok in zip(turns, r.xlora[name].correct, strict=True) if ok]
        count = switching if name == MIXED else per_domain
        step = max(1, len(right) // count)
        for turn in right[::step][:count]:
            domain = "+".join(item.domain for item in turn.items)
            chosen.append({"domain": domain, "prompt": turn.prompt, "answer": turn.answer})
    return chosen


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def losses_table(r: Results) -> str:
    """Gate settings by text."""
    names = [*DOMAIN_NAMES, MIXED]
    return table(["gate", *names], [[k, *(f"{v[n]:.4f}" for n in names)] for k, v in r.losses.items()])


def answers_table(r: Results) -> str:
    """Exact match and agreement by text."""
    rows = []
    for name, a in r.xlora.items():
        tokens = sum(len(g.ids) for g in a.generated)
        hits = sum(g.hits for g in a.generated) / tokens
        expert = f"{r.expert_exact[name]:.3f}" if name in r.expert_exact else "-"
        rows.append(
            [
                name,
                str(len(a.correct)),
                f"{a.exact_match:.3f}",
                expert,
                f"{r.base_exact[name]:.3f}",
                f"{hits:.3f}",
                str(tokens),
            ]
        )
    return table(["text", "questions", "X-LoRA exact", "own expert exact", "base exact", "agreement a", "tokens"], rows)


def gate_table(r: Results) -> str:
    """Accuracy and entropy by text."""
    rows = []
    for name, f in r.gate.items():
        edge = f"{f.entropy_boundaries:.3f}" if f.entropy_boundaries is not None else "-"
        rows.append(
            [name, f"{f.accuracy_answers:.3f}", f"{f.accuracy_questions:.3f}", f"{f.entropy_answers:.3f}", edge]
        )
    return table(
        [
            "text",
            "accuracy on answers",
            "accuracy on questions",
            "entropy on answers, nats",
            "entropy where the answer's domain changes",
        ],
        rows,
    )


def render(r: Results, shown: list[dict[str, str]], facts: dict[str, Any]) -> str:
    """`facts`: description lines made by the build (sizes, steps, seed, versions, times, oracle difference)."""
    bar_rows = [[b.text, b.measured, "yes" if b.holds else "**NO**"] for b in bars(r)]
    samples = "\n\n".join(f"```text\n{e['prompt']}{e['answer']}\n```" for e in _one_per_domain(shown))
    return f"""# What the demo bundle can do

Written by `model_store/build_demo.py`; every figure is measured on the files of this bundle (bf16 weights, computed in
fp32), on held-out questions whose content (numbers, codons, pairs of characters, function and argument) never occurs in
training. For `Who is ...` questions the facts are of course known; only the question's wording is new.

## Bars

{table(["bar", "measured", "holds"], bar_rows)}

Agreement *a* over all greedy tokens: **{r.agreement:.3f}** (forwards per token with lookahead: {2 - r.agreement:.2f}).

## Held-out loss, nats per answer token

{losses_table(r)}

*switching*: one question for two domains, so the answer changes domain in the middle.

## Greedy answers

{answers_table(r)}

Exact match means the whole text, character by character, and the end token. The base knows the shape of every answer
but not the house's words and facts; base and own expert are measured on the first 50 questions. *a* is the share of
X-LoRA's own greedy tokens that the scaling pass (base, gate 0) predicts at the same position: the hit rate of the
lookahead draft.

## The gate

{gate_table(r)}

Accuracy: argmax of the site-mean scalings = domain of the next token (chance 0.25; uniform entropy ln 4 =
{math.log(4):.3f}). **Part of this accuracy is trained for**: the gate's loss is the language model's through
both passes plus {facts["supervision"]} times -log(site-mean scaling of the right domain).

## How it was made

{facts["made"]}

{table(["stage", "steps", "tokens per step", "learning rate", "seconds"], facts["stages"])}

Seed {facts["seed"]}; {facts["versions"]}. Whole build: {facts["wall"]}. Bundle: {facts["size"]}.
Largest logit difference from PEFT's `XLoraModel` built in memory from these files, fp32: {facts["oracle"]}.

## Examples (held out; more in examples.json)

{samples}
"""


def _one_per_domain(shown: list[dict[str, str]]) -> list[dict[str, str]]:
    first: dict[str, dict[str, str]] = {}
    for e in shown:
        first.setdefault("+" if "+" in e["domain"] else e["domain"], e)
    return list(first.values())
