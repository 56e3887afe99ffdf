"""What the lookahead scaling pass brings: one engine with it against one without, one request at a time, greedy.

    python -m benchmarks.lookahead [--model DIR] [--prompts 8] [--tokens 128] [--repeats 3]

a is measured without cache and without the engine: transformers' own base, by way of the bundle's draft head where it
has one, and PEFT's X-LoRA read the text that X-LoRA has written, once each, and a is the share of tokens on which their
best guesses agree. A row per prompt.

    a_alone    the same without the draft head
    speedup    tokens/s with lookahead over without; the bar is on the prompts with a >= 0.7, together
    excess     forwards per token - (2 - a)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import DEMO, Bar, emit, make_engine, print_row, prompt_tokens, run_engine
from service.engine.engine import Engine
from tests.support.oracle import PeftOracle

_PROMPT = 64
_LIKELY = 0.7  # the a from which on the bar holds


class Agreement:
    """The two models, without any cache."""

    def __init__(self, model: Path) -> None:
        self._oracle = PeftOracle(model)
        self._base = AutoModelForCausalLM.from_pretrained(model / "base", dtype=torch.float32).eval()
        draft_head = model / "draft_head" / "draft_head.safetensors"
        self._draft_head = load_file(draft_head) if draft_head.exists() else None

    @torch.inference_mode()
    def of(self, prompt: list[int], tokens: list[int]) -> tuple[float, float, bool]:
        """a over the tokens that could be drafted (all but the last, after which nothing comes), with the draft head
        and without, and whether X-LoRA's best guesses are these tokens.
        """
        text = torch.tensor([prompt + tokens[:-1]])
        first = len(prompt) - 1  # each token is guessed from all before it
        hidden = self._base(text, output_hidden_states=True).hidden_states[-1][0, first:]
        xlora = self._oracle.logits(text[0].tolist())[first:].argmax(-1)
        agreeing = []
        for state in (self._drafting(hidden), hidden):
            drafts = self._base.get_output_embeddings()(state).argmax(-1)
            agreeing.append(float((drafts[:-1] == xlora[:-1]).float().mean()))
        return agreeing[0], agreeing[1], xlora.tolist() == tokens

    def _drafting(self, hidden: Tensor) -> Tensor:
        """h + D silu(U h + b)"""
        if self._draft_head is None:
            return hidden
        up, bias, down = (self._draft_head[name].float() for name in ("up.weight", "up.bias", "down.weight"))
        return hidden + torch.nn.functional.silu(hidden @ up.T + bias) @ down.T


def compare(
    engines: dict[bool, Engine], agreement: Agreement, prompt: list[int], tokens: int, repeats: int
) -> dict[str, Any]:
    """One row: with and without take turns, medians count."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    texts: set[tuple[int, ...]] = set()
    steps = {}
    for _ in range(repeats):
        for lookahead, engine in engines.items():
            run = run_engine(engine, [prompt], tokens)
            seconds[lookahead].append(run.seconds)
            steps[lookahead] = run.steps
            texts.add(tuple(run.tokens["0"]))
    text = list(texts.pop())
    a, a_alone, guessed = agreement.of(prompt, text)
    row = {
        "a": a,
        "a_alone": a_alone,
        "forwards_per_token": steps[True] / tokens,
        "excess": steps[True] / tokens - (2 - a),
        "without": steps[False] / tokens,
        "tokens_per_second": tokens / median(seconds[True]),
        "speedup": median(seconds[False]) / median(seconds[True]),
        "tokens_equal": guessed and not texts,
    }
    print_row(row)
    return row


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the rows must show."""
    likely = [row for row in rows if row["a"] >= _LIKELY]
    bars = [Bar("forwards per token - (2 - a), largest", "<=", 0.02, max(row["excess"] for row in rows))]
    if likely:
        seconds = [1 / row["tokens_per_second"] for row in likely]  # per token
        without = [row["speedup"] / row["tokens_per_second"] for row in likely]
        bars.append(Bar("with lookahead over without, a >= 0.7", ">=", 1.35, sum(without) / sum(seconds)))
    return [*bars, Bar("tokens equal", "==", True, all(row["tokens_equal"] for row in rows))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: the engine's")
    args = parser.parse_args()
    agreement = Agreement(args.model)
    engines = {
        lookahead: make_engine(args.model, threads=args.threads, lookahead=lookahead) for lookahead in (True, False)
    }
    for engine in engines.values():
        run_engine(engine, [prompt_tokens(args.model, _PROMPT)], 16)
    prompts = [prompt_tokens(args.model, _PROMPT, seed) for seed in range(args.prompts)]
    rows = [compare(engines, agreement, prompt, args.tokens, args.repeats) for prompt in prompts]
    emit({"benchmark": "lookahead", "threads": torch.get_num_threads(), "rows": rows}, bars_of(rows))


if __name__ == "__main__":
    main()
