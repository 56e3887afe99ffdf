"""What drafts bring, depth by depth: the demo's held-out questions, one request at a time, to the end of each answer.

    python -m benchmarks.lookahead [--model DIR] [--questions 4] [--repeats 3]

    depth        tokens that the scaling pass drafts ahead: 0 is no lookahead, 1 needs no draft layer
    a            a_1, a_2, ...: the share of right drafts by depth, where those before them were right (agreement.py)
    forwards     per token, prompts included; `expected` of a, `excess` what is above it, and `without_overruling` what
                 would be expected if the scaling pass overruled no deeper draft
    speedup      tokens/s over those at depth 0

All depths run in turns on one model, greedy and at temperature 0.8; medians of whole rounds count, and tokens must be
the same at every depth. Greedy, `a_apart` is a_1 measured without cache and without the engine: transformers' own base,
by way of the bundle's draft head where it has one, and PEFT's X-LoRA read the texts that X-LoRA has written, once each,
and it is the share of tokens on which their best guesses agree. `a_alone` is the same without the draft head.
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

from benchmarks.agreement import WatchedRunner, forwards_per_token, watch, without_overruling
from benchmarks.common import DEMO, Bar, EngineRun, build_engines, emit, print_row, run_engine
from benchmarks.questions import MAX_TOKENS, held_out_questions
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import load_checkpoint_and_model
from service.engine.speculation.costs import StepCost
from tests.support.oracle import PeftOracle

_SAMPLED = {"temperature": 0.8, "seed": 1}


class Agreement:
    """The two models, without any cache."""

    def __init__(self, model: Path) -> None:
        self._oracle = PeftOracle(model)
        self._base = AutoModelForCausalLM.from_pretrained(model / "base", dtype=torch.float32).eval()
        draft_head = model / "draft_head" / "draft_head.safetensors"
        self._draft_head = load_file(draft_head) if draft_head.exists() else None

    @torch.inference_mode()
    def of(self, prompt: list[int], tokens: list[int]) -> tuple[Tensor, Tensor, bool]:
        """Of the tokens that could be drafted (all but the first), which are: with the draft head and without. And
        whether X-LoRA's best guesses are these tokens.
        """
        text = torch.tensor([prompt + tokens[:-1]])
        first = len(prompt) - 1  # each token is guessed from all before it
        hidden = self._base(text, output_hidden_states=True).hidden_states[-1][0, first:]
        xlora = self._oracle.logits(text[0].tolist())[first:].argmax(-1)
        agreeing = [
            self._base.get_output_embeddings()(state).argmax(-1)[1:] == xlora[1:]
            for state in (self._drafting(hidden), hidden)
        ]
        return agreeing[0], agreeing[1], xlora.tolist() == tokens

    def _drafting(self, hidden: Tensor) -> Tensor:
        """h + D silu(U h + b)"""
        if self._draft_head is None:
            return hidden
        up, bias, down = (self._draft_head[name].float() for name in ("up.weight", "up.bias", "down.weight"))
        return hidden + torch.nn.functional.silu(hidden @ up.T + bias) @ down.T


def answers(engine: Engine, questions: list[list[int]], sampling: dict[str, Any]) -> list[EngineRun]:
    """Every question by itself, to the end of its answer."""
    return [run_engine(engine, [one], MAX_TOKENS, ignore_eos=False, **sampling) for one in questions]


def compare(
    engines: dict[int, Engine], questions: list[list[int]], sampling: dict[str, Any], repeats: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """A row per depth, and the answers; depths take turns. Forwards and agreement are counted with every draft made, as
    if rows were free; `chosen` are the forwards per token where the engine drafts as deep as pays, which is timed.
    """
    counted: dict[int, tuple[list[EngineRun], list[float]]] = {}
    for depth, engine in engines.items():
        cost, engine._scheduler.drafts.cost = engine._scheduler.drafts.cost, StepCost()
        own = answers(engine, questions, sampling)
        counted[depth] = own, engine.runner.judged().rates if isinstance(engine.runner, WatchedRunner) else []
        engine._scheduler.drafts.cost = cost
    seconds: dict[int, list[float]] = {depth: [] for depth in engines}
    runs: dict[int, list[EngineRun]] = {}
    for _ in range(repeats):
        for depth, engine in engines.items():
            runs[depth] = answers(engine, questions, sampling)
            seconds[depth].append(sum(run.seconds for run in runs[depth]))
    texts = [run.tokens["0"] for run in runs[0]]
    tokens = sum(map(len, texts))
    rows = []
    for depth in engines:
        own, a = counted[depth]
        forwards = sum(run.steps for run in own) / tokens
        expected = forwards_per_token(a, tokens / len(texts))
        row = {
            "temperature": sampling.get("temperature", 0.0),
            "depth": depth,
            "a": a,
            "forwards": forwards,
            "expected": expected,
            "excess": forwards - expected,
            "without_overruling": without_overruling(a, tokens / len(texts)),
            "chosen": sum(run.steps for run in runs[depth]) / tokens,
            "tokens_per_second": tokens / median(seconds[depth]),
            "speedup": median(seconds[0]) / median(seconds[depth]),
            "tokens_equal": all([run.tokens["0"] for run in each] == texts for each in (own, runs[depth])),
        }
        print_row(row)
        rows.append(row)
    return rows, texts


def apart(agreement: Agreement, questions: list[list[int]], texts: list[list[int]]) -> dict[str, Any]:
    """a_1 of greedy answers by transformers and PEFT."""
    found = [agreement.of(prompt, tokens) for prompt, tokens in zip(questions, texts, strict=True)]
    row: dict[str, Any] = {
        "a_apart": float(torch.cat([one[0] for one in found]).float().mean()),
        "a_alone": float(torch.cat([one[1] for one in found]).float().mean()),
        "tokens_equal": all(one[2] for one in found),
    }
    print_row(row)
    return row


def bars_of(rows: list[dict[str, Any]], oracle: dict[str, Any]) -> list[Bar]:
    """What the rows must show."""
    bars = [Bar("forwards per token from expected, farthest", "<=", 0.05, max(abs(row["excess"]) for row in rows))]
    plain = max(abs(row["excess"]) for row in rows if row["depth"] == 1)
    bars.append(Bar("forwards per token over 2 - a, one token ahead", "<=", 0.02, plain))
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        own = {row["depth"]: row for row in rows if row["temperature"] == temperature}
        limit = 0.75 if temperature else 0.6
        bars.append(Bar(f"temperature {temperature}: forwards per token", "<=", limit, own[max(own)]["forwards"]))
        bars.append(Bar(f"temperature {temperature}: depth 1 over none", ">=", 1.35, own[1]["speedup"]))
        if len(own) > 2:
            gain = own[max(own)]["speedup"] / own[1]["speedup"]
            bars.append(Bar(f"temperature {temperature}: depth {max(own)} over depth 1", ">=", 1.0, gain))
    equal = oracle["tokens_equal"] and all(row["tokens_equal"] for row in rows)
    difference = abs(rows[1]["a"][0] - oracle["a_apart"])
    bars.append(Bar("a_1 greedy, from that of transformers and PEFT", "<=", 0.01, difference))
    return [*bars, Bar("tokens equal", "==", True, equal)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--questions", type=int, default=4, help="of each domain")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: the engine's")
    args = parser.parse_args()
    options = EngineOptions(
        str(args.model), dtype="float32", threads=args.threads, prefix_cache=False, speculative_tokens=0
    )
    model, checkpoint = load_checkpoint_and_model(options)
    depths = range(2 if model.draft_chain is None else len(model.draft_chain.layer.agreement) + 1)
    engines = dict(zip(depths, build_engines(model, checkpoint, options, depths), strict=True))
    questions = held_out_questions(args.model, args.questions)
    for engine in engines.values():
        run_engine(engine, questions[:1], 16)  # warms up
        watch(engine)
    rows, texts = compare(engines, questions, {}, args.repeats)
    oracle = apart(Agreement(args.model), questions, texts)
    rows += compare(engines, questions, _SAMPLED, args.repeats)[0]
    result = {"benchmark": "lookahead", "threads": torch.get_num_threads(), "questions": len(questions)}
    emit({**result, "rows": rows, "apart": oracle}, bars_of(rows, oracle))


if __name__ == "__main__":
    main()
