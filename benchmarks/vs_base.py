"""X-LoRA against the plain base model in the same engine, and that base against transformers' own decode loop.

    python -m benchmarks.vs_base [--model DIR] [--tokens 128] [--repeats 3] [--no-large]

The base is the same engine on the same weights without gate, experts and scaling stream: the floor. Every figure is the
rate of decoding, tokens after the first per second after the first; medians count, and all sides take turns.

    demo    X-LoRA, the base, and a greedy loop over transformers' model with its StaticCache. `steered` is the base as
            a request gets it from X-LoRA's engine: no scaling stream, experts times zero
    large   a random model of 246 million parameters with 4 experts of rank 8 on every linear, made on the fly; tokens
            follow a script and drafts are forced to agree or to miss. Stored in bf16 and in fp32, one thread and two
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging as transformers_logging

from benchmarks.common import DEMO, Bar, build_engines, emit, print_row, prompt_tokens, run_engine, use_threads
from benchmarks.forced import BASE_REQUEST, forced_engines, use_plain_base
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import load_checkpoint_and_model
from tests.support.bundles import ALL_TARGETS, make_bundle

Side = Callable[[], tuple[float, list[int]]]  # one run: decoded tokens/s, and all tokens
_PROMPT = 64
_LARGE_PROMPT = 16


def take_turns(sides: dict[str, Side], repeats: int) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Median tokens/s and the tokens of each side."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            rate, tokens[name] = side()
            rates[name].append(rate)
    return {name: median(own) for name, own in rates.items()}, tokens


def engine_side(engine: Engine, prompt: list[int], tokens: int, *, is_base: bool = False) -> Side:
    """Decoding one request."""

    def run() -> tuple[float, list[int]]:
        done = run_engine(engine, [prompt], tokens, BASE_REQUEST if is_base else {})
        return done.decode_tokens_per_second, done.tokens["0"]

    return run


def static_cache_side(model: Path, prompt: list[int], tokens: int) -> Side:
    """transformers' own decoding: a greedy loop over the model's forward with a StaticCache, eager."""
    base = AutoModelForCausalLM.from_pretrained(model / "base", dtype=torch.float32).eval()

    @torch.inference_mode()
    def run() -> tuple[float, list[int]]:
        cache = StaticCache(config=base.config, max_cache_len=len(prompt) + tokens)
        logits = base(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
        written = [int(logits[0, -1].argmax())]
        started = time.perf_counter()
        for position in range(len(prompt), len(prompt) + tokens - 1):
            logits = base(
                input_ids=torch.tensor([written[-1:]]), position_ids=torch.tensor([[position]]), past_key_values=cache
            ).logits
            written.append(int(logits[0, -1].argmax()))
        return (tokens - 1) / (time.perf_counter() - started), written

    return run


def demo(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Its only row, and the bars."""
    prompt = prompt_tokens(args.model, _PROMPT)
    options = EngineOptions(
        str(args.model), dtype="float32", threads=args.threads, prefix_cache=False, speculative_tokens=0
    )
    model, checkpoint = load_checkpoint_and_model(options)
    xlora, base = build_engines(model, checkpoint, options, 2)
    use_plain_base(base)
    sides: dict[str, Side] = {
        "xlora": engine_side(xlora, prompt, args.tokens),
        "base": engine_side(base, prompt, args.tokens, is_base=True),
        "steered": engine_side(xlora, prompt, args.tokens, is_base=True),
        "transformers": static_cache_side(args.model, prompt, args.tokens),
    }
    take_turns(sides, 1)  # warms up
    rates, tokens = take_turns(sides, args.repeats)
    row = {
        **{f"{name}_tokens_per_second": rates[name] for name in ("xlora", "base", "transformers")},
        "xlora_over_base": rates["xlora"] / rates["base"],
        "steered_over_base": rates["steered"] / rates["base"],
        "base_over_transformers": rates["base"] / rates["transformers"],
    }
    print_row(row)
    equal = tokens["base"] == tokens["steered"] == tokens["transformers"]
    bars = [
        Bar("demo: X-LoRA over base", ">=", 0.65, row["xlora_over_base"]),
        Bar("demo: base over transformers' static cache", ">=", 0.9, row["base_over_transformers"]),
        Bar("demo: base tokens equal to transformers'", "==", True, equal),
    ]
    return [row], bars


def large_bundle(path: Path, *, hidden: int, layers: int, stored: str = "float32") -> Path:
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
    )


def large(
    bundle: Path, stored: str, threads: list[int], tokens: int, repeats: int
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row and two bars per number of threads."""
    options = EngineOptions(
        str(bundle), dtype="float32", max_model_len=512, max_num_seqs=1, prefix_cache=False, speculative_tokens=0
    )
    model, checkpoint = load_checkpoint_and_model(options)
    engines = forced_engines(model, checkpoint, options)
    prompt = list(range(100, 100 + _LARGE_PROMPT))
    rows, bars = [], []
    for count in threads:
        use_threads(count)
        sides = {name: engine_side(engine, prompt, tokens, is_base=name == "base") for name, engine in engines.items()}
        for engine in engines.values():
            run_engine(engine, [prompt], 2)  # warms up
        rates, _ = take_turns(sides, repeats)
        row = {
            "stored": stored,
            "threads": count,
            "base_tokens_per_second": rates["base"],
            **{f"{name}_over_base": rates[name] / rates["base"] for name in ("agree", "miss")},
        }
        print_row(row)
        rows.append(row)
        for name, limit in (("agree", 0.85), ("miss", 0.45)):
            what = f"large, stored in {stored}, {count} thread{'s'[: count - 1]}: X-LoRA over base, drafts {name}"
            bars.append(Bar(what, ">=", limit, row[f"{name}_over_base"]))
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads for the demo; default: the engine's")
    parser.add_argument("--no-large", action="store_true", help="the demo alone")
    parser.add_argument("--large-tokens", type=int, default=32)
    parser.add_argument("--large-hidden", type=int, default=1024)
    parser.add_argument("--large-layers", type=int, default=16)
    parser.add_argument("--large-threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    rows, bars = demo(args)
    large_rows: list[dict[str, Any]] = []
    if not args.no_large:
        with tempfile.TemporaryDirectory() as folder:
            for stored in ("bfloat16", "float32"):
                path = Path(folder) / stored
                bundle = large_bundle(path, hidden=args.large_hidden, layers=args.large_layers, stored=stored)
                more, more_bars = large(bundle, stored, args.large_threads, args.large_tokens, args.repeats)
                large_rows += more
                bars += more_bars
    emit({"benchmark": "vs_base", "demo": rows, "large": large_rows}, bars)


if __name__ == "__main__":
    main()
