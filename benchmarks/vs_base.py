"""X-LoRA against the plain base model in the same engine, and that base against transformers' own decode loop.

    python -m benchmarks.vs_base [--model DIR] [--questions 4] [--repeats 3] [--no-large]

The base is the same engine on the same weights without gate, experts and scaling stream: the floor. Every figure is the
rate of decoding, tokens after the first per second after the first. All sides take turns; the median of all rounds
counts, of rates and of ratios.

    demo    held-out questions one by one, to the end of each answer: X-LoRA with drafts as deep as the bundle has them
            (`xlora`) and one token deep (`lookahead`); the base on the same questions, as many tokens of each; and a
            greedy loop over transformers' model with its StaticCache. `steered` is the base as a request gets it from
            X-LoRA's engine: no scaling stream, experts times zero. `a` is how often drafts agree, by depth
    large   a random model of 246 million parameters with 4 experts of rank 8 on every linear, made on the fly; tokens
            follow a script. Lookahead that always agrees or misses, lookahead at the demo's a_1, and drafts at all of
            its a, as deep as pays; beside those two what follows from a, bytes and the measured cost of a row
            (agreement.py). Stored in bf16 and in fp32, one thread and two
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging as transformers_logging

from benchmarks.agreement import costs_of, forwards_per_token, watch
from benchmarks.common import DEMO, Bar, EngineRun, build_engines, emit, print_row, run_engine, use_threads
from benchmarks.forced import AGREE_AND_MISS, BASE_REQUEST, forced_engines, use_plain_base
from benchmarks.questions import MAX_TOKENS, held_out_questions
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import load_checkpoint_and_model
from tests.support.bundles import ALL_TARGETS, make_bundle

Side = Callable[[], tuple[float, list[int]]]  # one run: decoded tokens/s, and all tokens
_LARGE_PROMPT = 32


@dataclass(frozen=True)
class Turns:
    """What sides did that took turns, round by round."""

    rates: dict[str, list[float]]  # tokens/s of each side, by round
    tokens: dict[str, list[int]]  # of each side's last run

    def rate(self, name: str) -> float:
        """The median tokens/s of a side."""
        return median(self.rates[name])

    def over(self, name: str, other: str) -> float:
        """The median over all rounds of one side's rate over another's in the same round."""
        return median(ours / theirs for ours, theirs in zip(self.rates[name], self.rates[other], strict=True))


def take_turns(sides: dict[str, Side], repeats: int) -> Turns:
    """Runs every side `repeats` times, one after the other."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            rate, tokens[name] = side()
            rates[name].append(rate)
    return Turns(rates, tokens)


def engine_side(engine: Engine, prompt: list[int], tokens: int, *, is_base: bool = False) -> Side:
    """Decoding one request."""

    def run() -> tuple[float, list[int]]:
        done = run_engine(engine, [prompt], tokens, BASE_REQUEST if is_base else {})
        return done.decode_tokens_per_second, done.tokens["0"]

    return run


def questions_side(engine: Engine, questions: list[list[int]], lengths: list[int] | None = None) -> Side:
    """Every question by itself: to the end of X-LoRA's answer, or so many tokens of the base's."""

    def ask(number: int) -> EngineRun:
        if lengths is None:
            return run_engine(engine, [questions[number]], MAX_TOKENS, ignore_eos=False)
        return run_engine(engine, [questions[number]], lengths[number], BASE_REQUEST)

    def run() -> tuple[float, list[int]]:
        runs = [ask(number) for number in range(len(questions))]
        seconds = sum(one.seconds - one.first_token_seconds for one in runs)
        tokens = [token for one in runs for token in one.tokens["0"]]
        return (len(tokens) - len(runs)) / seconds, tokens

    return run


def static_cache_side(model: Path, questions: list[list[int]], lengths: list[int]) -> Side:
    """transformers' own decoding: a greedy loop over the model's forward with a StaticCache, eager."""
    base = AutoModelForCausalLM.from_pretrained(model / "base", dtype=torch.float32).eval()

    @torch.inference_mode()
    def write(prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        cache = StaticCache(config=base.config, max_cache_len=len(prompt) + tokens)
        logits = base(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
        written = [int(logits[0, -1].argmax())]
        started = time.perf_counter()
        for position in range(len(prompt), len(prompt) + tokens - 1):
            logits = base(
                input_ids=torch.tensor([written[-1:]]), position_ids=torch.tensor([[position]]), past_key_values=cache
            ).logits
            written.append(int(logits[0, -1].argmax()))
        return time.perf_counter() - started, written

    def run() -> tuple[float, list[int]]:
        done = [write(prompt, tokens) for prompt, tokens in zip(questions, lengths, strict=True)]
        written = [token for _, own in done for token in own]
        return (len(written) - len(done)) / sum(seconds for seconds, _ in done), written

    return run


def demo(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Its row, and the bars."""
    questions = held_out_questions(args.model, args.questions)
    options = EngineOptions(
        str(args.model), dtype="float32", threads=args.threads, prefix_cache=False, speculative_tokens=0
    )
    model, checkpoint = load_checkpoint_and_model(options)
    xlora, lookahead, base = build_engines(model, checkpoint, options, (None, 1, 1))
    use_plain_base(base)
    watched = watch(xlora)
    runs = [run_engine(xlora, [one], MAX_TOKENS, ignore_eos=False) for one in questions]
    a = watched.judged().rates
    lengths = [len(run.tokens["0"]) for run in runs]
    sides: dict[str, Side] = {
        "xlora": questions_side(xlora, questions),
        "lookahead": questions_side(lookahead, questions),
        "base": questions_side(base, questions, lengths),
        "steered": questions_side(xlora, questions, lengths),
        "transformers": static_cache_side(args.model, questions, lengths),
    }
    take_turns(sides, 1)  # warms up
    turns = take_turns(sides, args.repeats)
    row = {
        "a": a,
        "forwards": sum(run.steps for run in runs) / sum(lengths),
        **{f"{name}_tokens_per_second": turns.rate(name) for name in ("xlora", "base", "transformers")},
        **{f"{name}_over_base": turns.over(name, "base") for name in ("xlora", "lookahead", "steered")},
        "base_over_transformers": turns.over("base", "transformers"),
    }
    tokens = turns.tokens
    print_row(row)
    equal = tokens["base"] == tokens["steered"] == tokens["transformers"]
    bars = [
        Bar("demo: X-LoRA over base", ">=", 1.0 if len(a) > 1 else 0.65, row["xlora_over_base"]),
        Bar("demo: X-LoRA over base, lookahead alone", ">=", 0.65, row["lookahead_over_base"]),
        Bar("demo: base over transformers' static cache", ">=", 0.9, row["base_over_transformers"]),
        Bar("demo: tokens equal at both depths", "==", True, tokens["xlora"] == tokens["lookahead"]),
        Bar("demo: base tokens equal to transformers'", "==", True, equal),
    ]
    return row, bars


def large_bundle(
    path: Path, *, hidden: int, layers: int, stored: str = "float32", draft_depth: int | None = None
) -> Path:
    """A random Llama with 4 experts of rank 8 on every linear; 246 million parameters at 1024 wide and 16 layers."""
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256), "head_dim": 64}
    return make_bundle(
        path,
        hidden=hidden,
        layers=layers,
        experts=("a", "b", "c", "d"),
        ranks=8,
        alphas=16,
        targets=list(ALL_TARGETS),
        vocab=32000,
        base_config={"intermediate_size": hidden * 11 // 4, **heads},
        xlora={"layerwise_scalings": True},
        dtype=getattr(torch, stored),
        draft_depth=draft_depth,
    )


def large(
    bundle: Path, stored: str, args: argparse.Namespace, a: list[float]
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row and its bars per number of threads; drafts agree at `a`."""
    options = EngineOptions(
        str(bundle), dtype="float32", max_model_len=512, max_num_seqs=1, prefix_cache=False, speculative_tokens=0
    )
    model, checkpoint = load_checkpoint_and_model(options)
    forced = {**AGREE_AND_MISS, "lookahead": a[:1], "drafts": a}
    engines = forced_engines(model, checkpoint, options, forced)
    prompt, tokens = list(range(100, 100 + _LARGE_PROMPT)), args.large_tokens
    rows, bars = [], []
    for count in args.large_threads:
        use_threads(count, engines.values())
        sides = {name: engine_side(engine, prompt, tokens, is_base=name == "base") for name, engine in engines.items()}
        forwards = {name: run_engine(engine, [prompt], tokens).steps for name, engine in engines.items()}  # warms up
        turns = take_turns(sides, args.repeats)
        costs = costs_of(engines["drafts"])
        row = {
            "stored": stored,
            "threads": count,
            "a": a,
            "base_tokens_per_second": turns.rate("base"),
            **{f"{name}_over_base": turns.over(name, "base") for name in forced},
            **{f"{name}_predicted": costs.over_base(forced[name]) for name in ("lookahead", "drafts")},
            "depth": costs.depth(a),
            "forwards": forwards["drafts"] / tokens,
            "expected": forwards_per_token(a[: costs.depth(a)], tokens),
            "costs": asdict(costs),
        }
        print_row(row)
        rows.append(row)
        for name, limit in (("agree", 0.85), ("miss", 0.45), *((("drafts", 1.1),) if len(a) > 1 else ())):
            what = f"large, stored in {stored}, {count} thread{'s'[: count - 1]}: X-LoRA over base, {name}"
            bars.append(Bar(what, ">=", limit, row[f"{name}_over_base"]))
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--questions", type=int, default=4, help="of each domain")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads for the demo; default: the engine's")
    parser.add_argument("--no-large", action="store_true", help="the demo alone")
    parser.add_argument("--large-tokens", type=int, default=64)
    parser.add_argument("--large-hidden", type=int, default=1024)
    parser.add_argument("--large-layers", type=int, default=16)
    parser.add_argument("--large-threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    row, bars = demo(args)
    large_rows: list[dict[str, Any]] = []
    if not args.no_large:
        with tempfile.TemporaryDirectory() as folder:
            for stored in ("bfloat16", "float32"):
                path = Path(folder) / stored
                shape = {"hidden": args.large_hidden, "layers": args.large_layers}
                depth = len(row["a"]) if len(row["a"]) > 1 else None
                bundle = large_bundle(path, **shape, stored=stored, draft_depth=depth)
                more, more_bars = large(bundle, stored, args, row["a"])
                large_rows += more
                bars += more_bars
    emit({"benchmark": "vs_base", "demo": [row], "large": large_rows}, bars)


if __name__ == "__main__":
    main()
