"""An 8B-shaped X-LoRA model with random weights on a GPU against its plain base in the same engine.

    python -m benchmarks.gpu [--requests 1 8 32 128] [--agreement 1 0.7 0] [--layers N] [--hidden N]
    python -m benchmarks.gpu --device cpu --tiny          the same code in seconds, for a test
    python -m benchmarks.gpu --sections copy decode --results FILE

    copy        bytes read and written per second by a device-to-device copy of the largest buffers
    warm_up     seconds to capture the steps of both sides
    parity      logits of captured and eager steps
    decode      tokens/s of the engine when all requests decode, at forced agreement rates, over the plain base
    step        one captured step alone: seconds, and weight bytes per second as a share of the copy
    prefill     prompt tokens/s until all requests have their first token, over the plain base
    attention   every backend on block sizes 16, 64 and 256: seconds a call, and bytes of keys and values per second
    graphs      decode with every kernel launched by itself
    kernels     how many a step launches, and which take longest
    memory      peak, weights, keys and values

The base is the same weights and the same engine without gate, experts and scaling stream. Tokens are forced to depend
on positions alone (benchmarks/synthetic.py), so that drafts agree as often as asked. A section that fails is reported
under "errors" and does not stop the others. One that hangs ends the process after its own limit, with a traceback; what
was measured until then is in the results file, and gpu_session.py goes on with the sections after it.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import statistics
import time
import traceback
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts
from benchmarks.common import emit, note, print_row
from benchmarks.forced import PlainBase
from benchmarks.gpu_parts import idle_batch, seconds_of, synchronize
from benchmarks.synthetic import (
    LLAMA_8B,
    TINY,
    ForcedTokens,
    RealRowsOnly,
    Shape,
    build,
    captured_steps,
    weight_bytes,
)
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.loader import build_engine
from service.engine.speculation.costs import StepCost

_PROMPT = 64
_WARM_TOKENS = 8
_STEP_COST = StepCost.linear(0.007, 0.02)  # of an H200, so that every run drafts as often
SECTIONS = {
    **{"copy": 20, "warm_up": 90, "parity": 30, "decode": 150, "step": 30, "prefill": 30},
    **{"attention": 60, "graphs": 60, "kernels": 30, "memory": 10},
}
"""In their order, with the seconds that each may take."""
_BUILD_SECONDS = 120
_DEVICE_IS_LOST = 3  # exit code


@dataclass
class Bench:
    """The model and what the sections share."""

    args: argparse.Namespace
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    section: str = "build"

    def __post_init__(self) -> None:
        self.context = min(self.shape.context, 4096)
        self.model, self.checkpoint = build(self.shape, self.device, self.dtype)
        most = max(self.args.requests)
        rows_of_all = most * (_PROMPT + self.args.tokens + 2 * 16)
        slots = max(rows_of_all, self.args.prefill_requests * self.args.prefill_tokens, self.context)
        layout = self.model.kv_layout(self.args.block_size)
        blocks = layout.blocks_for(slots) + 4 * most
        options = EngineOptions(
            model="synthetic",
            device=str(self.device),
            max_model_len=self.context,
            max_num_seqs=most,
            kv_memory_bytes=blocks * layout.block_bytes,
            block_size=self.args.block_size,
            speculative_tokens=0,
            prefix_cache=False,
            cuda_graphs=False,  # captured below, on any device
        )
        rows = 2 * most
        self.engine = build_engine(self.model, self.checkpoint, options, step_cost=_STEP_COST)
        cache = self.engine.runner.kv_cache
        self.captured = captured_steps(self.model, cache, rows, self.context)
        # Its budget counts the scaling rows it drops: twice the budget is as many rows in a step.
        doubled = replace(options, max_num_batched_tokens=2 * self.engine.info.max_num_batched_tokens)
        self.base_engine = build_engine(self.model, self.checkpoint, doubled, step_cost=_STEP_COST)
        self.plain = PlainBase(self.model)
        base_cache = self.base_engine.runner.kv_cache
        self.base_captured = captured_steps(self.plain, base_cache, rows, self.context)

    def xlora(self, agreement: float, *, graphs: bool = True) -> Engine:
        """The engine with drafts forced to agree that often."""
        step = self.captured if graphs else self.model
        self.engine.runner.step = self.forced(step, agreement)
        return self.engine

    def base(self, *, graphs: bool = True) -> Engine:
        """The engine of the plain base."""
        step = RealRowsOnly(self.base_captured if graphs else self.plain, self.shape.vocabulary)
        self.base_engine.runner.step = self.forced(step, 1.0)
        return self.base_engine

    def forced(self, step: Any, agreement: float) -> ForcedTokens:
        """The step with tokens that follow from positions."""
        return ForcedTokens(step, self.shape.vocabulary, self.shape.context, self.device, [agreement])

    # -- sections ------------------------------------------------------------------------------------------------

    @cached_property
    def copy_bytes_per_second(self) -> float:
        """What the memory can do."""
        size = (1 << 32) if self.device.type == "cuda" else 1 << 24
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / seconds_of(lambda: target.copy_(source), 10, self.device)

    def record(self, row: dict[str, Any]) -> None:
        """Shows a row, and puts it where it stays."""
        print_row(row)
        note(self.args.results, {"section": self.section, **row})

    def copy(self) -> dict[str, Any]:
        """What the memory can do."""
        row = {"bytes_per_second": self.copy_bytes_per_second}
        self.record(row)
        return row

    def warm_up(self) -> dict[str, Any]:
        """Captures all numbers of rows, so that no later section pays for it."""
        result = {}
        for name, steps in (("base", self.base_captured), ("xlora", self.captured)):
            started = time.perf_counter()
            steps.warm_up()
            result[name] = {"seconds": time.perf_counter() - started, "captured": len(steps.captured)}
            self.record({"side": name, **result[name]})
            if len(steps.captured) < len(steps.row_buckets):
                raise RuntimeError(f"{name}: captured only {steps.captured}; the log above says why")
        return result

    def step(self) -> list[dict[str, Any]]:
        """One captured step, no engine around it: the base's with n rows, X-LoRA's with n and 2n (a draft each)."""
        results = []
        for requests in self.args.requests:
            sides = [
                ("base", self.base_engine, self.base_captured, requests),
                ("xlora, no draft", self.engine, self.captured, requests),
                ("xlora, draft", self.engine, self.captured, 2 * requests),
            ]
            for name, engine, steps, rows in sides:
                cache = engine.runner.kv_cache
                batch = idle_batch(cache, rows, position=_PROMPT)
                seconds = seconds_of(partial(steps.forward, batch, cache), 20, self.device)
                read = weight_bytes(self.model, with_experts=name != "base") / seconds
                row = {"side": name, "requests": requests, "rows": rows, "seconds": seconds}
                row |= {"weight_bytes_per_second": read, "share_of_copy": read / self.copy_bytes_per_second}
                self.record(row)
                results.append(row)
        return results

    def decode(self) -> list[dict[str, Any]]:
        """Both sides at every number of requests."""
        rows = []
        for requests in self.args.requests:
            base = self.decode_once(self.base(), requests, frozen=True)
            read = weight_bytes(self.model, with_experts=False) / base["seconds_per_step"]
            rows.append({"side": "base", "requests": requests, **base})
            rows[-1]["share_of_copy"] = read / self.copy_bytes_per_second
            self.record(rows[-1])
            for agreement in self.args.agreement:
                ours = self.decode_once(self.xlora(agreement), requests, frozen=False)
                read = weight_bytes(self.model, with_experts=True) / ours["seconds_per_step"]
                ours["share_of_copy"] = read / self.copy_bytes_per_second
                ours["over_base"] = ours["tokens_per_second"] / base["tokens_per_second"]
                rows.append({"side": "xlora", "requests": requests, "agreement": agreement, **ours})
                self.record(rows[-1])
        return rows

    def graphs(self) -> list[dict[str, Any]]:
        """Without them."""
        rows = []
        for requests in self.args.requests[:2]:
            for name, engine in (("base", self.base(graphs=False)), ("xlora", self.xlora(1.0, graphs=False))):
                measured = self.decode_once(engine, requests, frozen=name == "base")
                rows.append({"side": f"{name}, no graphs", "requests": requests, **measured})
                self.record(rows[-1])
        return rows

    def decode_once(self, engine: Engine, requests: int, *, frozen: bool) -> dict[str, Any]:
        """Steps in which every request decodes, after some that do not count (graphs are captured in those)."""
        tokens = self.args.tokens
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        produced = dict.fromkeys(map(str, range(requests)), 0)
        for name in produced:
            prompt = list(range(16, 16 + _PROMPT))
            engine.add(Request(name, prompt, sampling, freeze_after=1 if frozen else None))
        seconds: list[float] = []
        measured = hits = misses = 0
        while engine.has_work():
            started = time.perf_counter()
            output = engine.step()
            elapsed = time.perf_counter() - started
            counts = min(produced.values()) >= _WARM_TOKENS and max(produced.values()) < tokens - 2
            for one in output.outputs:
                produced[one.request_id] += len(one.tokens)
                measured += len(one.tokens) if counts else 0
            if counts:
                seconds.append(elapsed)
                hits, misses = hits + output.stats.drafts.hits, misses + output.stats.drafts.misses
        return {
            "tokens_per_second": measured / sum(seconds),
            "seconds_per_step": statistics.median(seconds),
            "forwards_per_token": len(seconds) * requests / measured,
            "drafts_agreed": hits / (hits + misses) if hits + misses else None,
        }

    def prefill(self) -> list[dict[str, Any]]:
        """Long prompts at once; the second run of each counts."""
        requests, length = self.args.prefill_requests, self.args.prefill_tokens
        rows: list[dict[str, Any]] = []
        for name, engine in (("base", self.base()), ("xlora", self.xlora(1.0))):
            seconds = [self.prefill_once(engine, requests, length, frozen=name == "base") for _ in range(2)][1]
            rows.append({"side": name, "requests": requests, "prompt": length, "seconds": seconds})
            rows[-1]["prompt_tokens_per_second"] = requests * length / seconds
        rows[1]["over_base"] = rows[0]["seconds"] / rows[1]["seconds"]
        for row in rows:
            self.record(row)
        return rows

    def prefill_once(self, engine: Engine, requests: int, length: int, *, frozen: bool) -> float:
        """Seconds until the last request has its token."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        prompt = [16 + i % 256 for i in range(length)]
        synchronize(self.device)
        started = time.perf_counter()
        for number in range(requests):
            engine.add(Request(str(number), prompt, sampling, freeze_after=1 if frozen else None))
        while engine.has_work():
            engine.step()
        return time.perf_counter() - started

    def parity(self) -> dict[str, Any]:
        """Logits of the same rows, captured and eager: the largest difference over the largest logit."""
        cache = self.engine.runner.kv_cache
        batch = idle_batch(cache, 3, position=_PROMPT, scaling_rows=1)
        with torch.inference_mode():
            expected = self.model.forward(batch, cache).logits.float()
            ours = self.captured.forward(batch, cache).logits.float()
        difference = ((ours - expected).abs().max() / expected.abs().max()).item()
        self.record({"difference": difference})
        return {"difference": difference}

    def attention(self) -> list[dict[str, Any]]:
        """Backends by themselves."""
        cases, blocks = [(2, 1, 1024), (64, 1, 1024), (2, 1, 4000), (1, 1024, 1024)], [16, 64, 256]
        if self.args.tiny:
            cases, blocks = [(2, 1, 64), (4, 8, 64)], [16]
        return gpu_parts.attention(self.shape, self.dtype, self.device, cases, blocks, self.record)

    def kernels(self) -> dict[str, Any]:
        """Of one step with a real row and a draft, launched one by one."""
        cache = self.engine.runner.kv_cache
        return gpu_parts.kernels(self.model, cache, idle_batch(cache, 2, position=_PROMPT), self.record)

    def memory(self) -> dict[str, Any]:
        """In bytes."""
        cache = self.engine.runner.kv_cache
        pools = (*cache.keys, *cache.values, cache.gate_rows)
        row = {
            "peak": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            "reserved": torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None,
            "weights_read": weight_bytes(self.model, with_experts=True),
            "weights_read_by_base": weight_bytes(self.model, with_experts=False),
            "kv_of_one_engine": sum(pool.numel() * pool.element_size() for pool in pools),
        }
        self.record(row)
        return row


def run_sections(bench: Bench, names: list[str]) -> dict[str, Any]:
    """Every section's result by name; what went wrong under "errors"."""
    results: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name in names:
        started = begin(bench.args.results, name, SECTIONS[name])
        bench.section = name
        try:
            results[name] = getattr(bench, name)()
        except Exception as error:
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"[:500]
        note(bench.args.results, end_row(name, started, errors.get(name)))
        if name in errors:
            stop_if_lost(bench.device)
    faulthandler.cancel_dump_traceback_later()
    return results | {"errors": errors}


def begin(results: Path | None, section: str, seconds: float) -> float:
    """Begins a section that ends the process if it takes longer, wherever it hangs. Returns when it began."""
    print(f"-- {section}", flush=True)
    note(results, {"section": section, "begins": True})
    faulthandler.dump_traceback_later(seconds, exit=True)
    return time.perf_counter()


def end_row(section: str, started: float, error: str | None) -> dict[str, Any]:
    """The last row of a section."""
    seconds = time.perf_counter() - started
    print(f"   {seconds:.1f} s", flush=True)
    return {"section": section, "ends": True, "seconds": seconds} | ({"error": error} if error else {})


def stop_if_lost(device: torch.device) -> None:
    """Ends the process where a failure has left a CUDA context in which nothing works any more."""
    try:
        synchronize(device)
    except RuntimeError as error:
        print(f"the device is lost to this process: {error}", flush=True)
        raise SystemExit(_DEVICE_IS_LOST) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, one or two requests")
    parser.add_argument("--layers", type=int, help="default: 32")
    parser.add_argument("--hidden", type=int, help="default: 4096; everything else shrinks with it")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--agreement", type=float, nargs="+", default=[1.0, 0.7, 0.0])
    parser.add_argument("--tokens", type=int, default=96, help="generated per request")
    parser.add_argument("--prefill-requests", type=int, default=4)
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--results", type=Path, help="a file of JSON lines to which every row is added as it comes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    shape = LLAMA_8B
    if args.tiny:
        shape, args.requests, args.tokens = TINY, [1, 2], 24
        args.prefill_requests, args.prefill_tokens = 2, 100
    if args.hidden is not None:
        heads = args.hidden // shape.head_dim
        wide = args.hidden * shape.intermediate // shape.hidden
        shape = replace(shape, hidden=args.hidden, heads=heads, kv_heads=max(1, heads // 4), intermediate=wide)
    if args.layers is not None:
        shape = replace(shape, layers=args.layers)
    device = torch.device(args.device if args.device != "cuda" else "cuda:0")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    document: dict[str, Any] = {"benchmark": "gpu", "device": name, "dtype": args.dtype, "shape": vars(shape)}
    started = begin(args.results, "build", _BUILD_SECONDS)
    try:
        bench = Bench(args, shape, device, getattr(torch, args.dtype))
    except Exception as error:
        traceback.print_exc()
        errors = {"build": f"{type(error).__name__}: {error}"[:500]}
        note(args.results, end_row("build", started, errors["build"]))
        emit(document | {"errors": errors})
        raise SystemExit(1) from None
    note(args.results, end_row("build", started, None) | document)
    emit(document | run_sections(bench, args.sections))


if __name__ == "__main__":
    main()
