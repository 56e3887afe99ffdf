"""A bundle of the published X-LoRA's shape: the real server with default flags, and its speed over the base.

    python -m benchmarks.real_size [--layers 4] [--bundle DIR] [--threads 1] [--quantization int4] [-- FLAGS OF SERVE]
    python -m benchmarks.real_size --device cuda [--engine-only] [--results FILE] [--rates 0.97 0.93 0.88]
    python -m benchmarks.real_size --engine-only --captured

    server         ready after so many seconds, peak memory of all its processes (sum of VmHWM), a streamed answer, exit
                   code of SIGTERM. Beside it what `check --plan` says, a read of all weights, a SHA-256 of the largest
                   file, and transformers' from_pretrained of the base alone in a process of its own
    engine         tokens/s of X-LoRA over the plain base in the same engine: with lookahead that agrees and that misses
                   (the limits are those of bytes: a forward reads the base's linears, a real one the experts as well),
                   and with drafts that agree at --rates, by depth, the first alone and as deep as pays; beside those
                   two what follows from rates, bytes and the measured cost of a row (agreement.py)
    scalings       the same with `return_scalings: full`
    transformers   generate with a static cache over the base in bfloat16, and a prompt of 512 tokens; same threads

With --quantization there is no base of the same kind to compare with: the server's row and the engine's rates remain.
With --engine-only the server is left out, whose packages may be missing beside a GPU. On a GPU steps are captured; with
--captured they run in the same static buffers on a CPU.
Bars are for a CPU: on a GPU there are none.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.agreement import costs_of, forwards_per_token, read_bytes
from benchmarks.common import DEMO, ROOT, Bar, emit, note, print_row, run_engine, use_threads
from benchmarks.forced import AGREE_AND_MISS, PlainBase, forced_engines
from benchmarks.published_shape import make
from benchmarks.synthetic import ForcedTokens, captured_steps
from benchmarks.vs_base import engine_side, take_turns
from service.checkpoint import Checkpoint, load_checkpoint
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import build_engine, load_checkpoint_and_model, plan_for, read_checkpoint
from service.engine.memory_plan import PROCESS_BYTES
from service.engine.sequence import LOOKAHEAD_RATE
from service.engine.speculation.costs import StepCost
from service.model.xlora_model import XLoraModel

_READY_SECONDS = 1800.0
_PROMPT, _PREFILL, _CONTEXT = 32, 512, 1024
_GPU_POOL = 1 << 30  # bytes of keys and values of an engine on a GPU
_LOAD = """
import sys, time, torch
from transformers import AutoModelForCausalLM
started = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to(sys.argv[2])
peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.perf_counter() - started, peak)
"""


def peak_bytes(process: int) -> int:
    """VmHWM of a process and all its descendants."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    own = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return own + sum(peak_bytes(int(child)) for child in children)


def serve(path: Path, flags: list[str]) -> dict[str, Any]:
    """The server from its start to a streamed answer and SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--model", str(path), "--port", str(port), *flags]
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as server:
        try:
            while not _is_ready(url):
                if server.poll() is not None or time.perf_counter() - started > _READY_SECONDS:
                    raise SystemExit(f"the server did not become ready (exit code {server.returncode})")
                time.sleep(0.25)
            row: dict[str, Any] = {"ready_seconds": time.perf_counter() - started, "peak_bytes": peak_bytes(server.pid)}
            row |= stream(url) | {"peak_bytes_after": peak_bytes(server.pid)}
        finally:
            server.terminate()
            code = server.wait(60)
    return row | {"exit_code": code}


def stream(url: str) -> dict[str, float]:
    """Tokens per second of one answer after its first token."""
    body = {"prompt": "What is an expert?", "max_tokens": 24, "temperature": 0, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    started, times = time.perf_counter(), []
    with urllib.request.urlopen(request, timeout=_READY_SECONDS) as answer:
        for line in answer:
            if b'"token_ids"' in line:
                times.append(time.perf_counter())
    first, last = times[0], times[-1]
    return {"first_token_seconds": first - started, "tokens_per_second": (len(times) - 1) / (last - first)}


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return True
    except OSError:
        return False


def forget_files() -> bool:
    """Whether the kernel has dropped what it kept of files: only root may ask it to."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def loading(path: Path, device: str, flags: list[str] | None) -> dict[str, Any]:
    """The server's start (None: no server) beside what bounds it, the files from the disk both times where that can be
    had; and transformers' own loading of the base.
    """
    files = list(path.rglob("*.safetensors"))
    row: dict[str, Any] = {"files_bytes": sum(file.stat().st_size for file in files), "is_cold": forget_files()}
    if flags is not None:
        row |= serve(path, flags)
        forget_files()
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass
    row["read_seconds"] = time.perf_counter() - started
    with max(files, key=lambda file: file.stat().st_size).open("rb") as handle:
        started = time.perf_counter()
        hashlib.file_digest(handle, "sha256")
    row["sha256_seconds"] = time.perf_counter() - started
    command = [sys.executable, "-c", _LOAD, str(path / "base"), device]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    row |= {"from_pretrained_seconds": float(loaded[0]), "from_pretrained_peak_bytes": int(loaded[1])}
    return row


def engines_of(
    path: Path, device: str, quantization: str | None, rates: Mapping[str, Sequence[float]], *, captured: bool
) -> tuple[dict[str, Engine], XLoraModel, float]:
    """Engines for one request over one model, and the seconds in which the model was loaded."""
    options = EngineOptions(
        str(path),
        device=device,
        kv_memory_bytes=_GPU_POOL if captured else None,
        native_kernels=not captured,
        dtype="auto" if quantization is None else "bfloat16",
        quantization=quantization,  # type: ignore[arg-type]
        max_model_len=_CONTEXT,
        max_num_seqs=1,
        prefix_cache=False,
        speculative_tokens=0,
    )
    started = time.perf_counter()
    model, checkpoint = load_checkpoint_and_model(options)
    seconds = time.perf_counter() - started
    make = captured_engines if captured else forced_engines
    return make(model, checkpoint, options, rates), model, seconds


def captured_engines(
    model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions, rates: Mapping[str, Sequence[float]]
) -> dict[str, Engine]:
    """The sides of forced_engines in CUDA graphs; on a CPU in the same static buffers."""
    engines: dict[str, Engine] = {}
    for name, own in {"base": (1.0,), **rates}.items():
        depth = len(own)
        engine = build_engine(model, checkpoint, replace(options, cuda_graphs=False, draft_depth=depth))
        inner = PlainBase(model) if name == "base" else model
        steps = captured_steps(inner, engine.runner.kv_cache, 2 * depth * options.max_num_seqs, _CONTEXT)
        steps.warm_up()
        vocabulary = model.config.get_text_config().vocab_size
        engine.runner.step = ForcedTokens(steps, vocabulary, _CONTEXT, model.device, own)
        engines[name] = engine
    return engines


def decoding(
    engines: dict[str, Engine], rates_by_side: Mapping[str, Sequence[float]], tokens: int, repeats: int
) -> dict[str, Any]:
    """Tokens/s of all sides in turns, and of a prompt of 512 tokens."""
    prompt = list(range(100, 100 + _PROMPT))
    sides = {name: engine_side(engine, prompt, tokens, is_base=name == "base") for name, engine in engines.items()}

    def with_scalings() -> tuple[float, list[int]]:
        done = run_engine(engines["agree"], [prompt], tokens, {"return_scalings": "full"})
        return done.decode_tokens_per_second, done.tokens["0"]

    for side in sides.values():
        side()  # warms up
    turns = take_turns({**sides, "scalings": with_scalings}, repeats)
    long = [100 + number % 300 for number in range(_PREFILL)]
    prefill = {name: run_engine(engines[name], [long], 1).first_token_seconds for name in ("agree", "base")}
    return {
        **{f"{name}_tokens_per_second": turns.rate(name) for name in turns.rates},
        **{f"{name}_over_base": turns.over(name, "base") for name in rates_by_side},
        "scalings_over_agree": turns.over("scalings", "agree"),
        "prefill_seconds": prefill["agree"],
        "base_prefill_seconds": prefill["base"],
    }


def predicted(engines: dict[str, Engine], rates: Mapping[str, Sequence[float]], tokens: int) -> dict[str, Any]:
    """What follows from rates of agreement, beside what is measured: of this step, and of one where further rows cost
    nothing, as is nearly so on a GPU.
    """
    deepest = rates["drafts"]
    costs = costs_of(engines["drafts"])
    steps = run_engine(engines["drafts"], [list(range(100, 100 + _PROMPT))], tokens).steps
    return {
        **{f"{name}_predicted": costs.over_base(rates[name]) for name in ("lookahead", "drafts")},
        "free_rows_predicted": replace(costs, step=StepCost()).over_base(deepest),
        "rates": list(deepest),
        "depth": costs.depth(deepest),
        "forwards": steps / tokens,
        "expected_forwards": forwards_per_token(deepest[: costs.depth(deepest)], tokens),
        "costs": asdict(costs),
    }


def byte_limits(model: XLoraModel) -> dict[str, float]:
    """X-LoRA over the base if reading weights is all that a step costs."""
    base, experts, _ = read_bytes(model)
    return {"agree_limit": base / (base + experts), "miss_limit": base / (2 * base + experts)}


@torch.inference_mode()
def transformers_side(base: Path, device: str, tokens: int, repeats: int) -> dict[str, Any]:
    """generate with a static cache, and one forward over a prompt."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval().to(device)
    prompt = torch.arange(100, 100 + _PROMPT, device=device)[None]
    settings: dict[str, Any] = {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    rates = []
    for _ in range(repeats + 1):
        seconds = []
        for count in (1, tokens):
            config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, pad_token_id=0, **settings)
            started = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config).tolist()
            seconds.append(time.perf_counter() - started)
        rates.append((tokens - 1) / (seconds[1] - seconds[0]))
    long = torch.tensor([[100 + number % 300 for number in range(_PREFILL)]], device=device)
    started = time.perf_counter()
    model(input_ids=long, use_cache=True, logits_to_keep=1).logits.tolist()
    return {
        "transformers_tokens_per_second": median(rates[1:]),  # the first warms up
        "transformers_prefill_seconds": time.perf_counter() - started,
    }


def bars_of(row: dict[str, Any]) -> list[Bar]:
    """Return the bars of a run on a machine with nothing else to do."""
    bound = max(row["read_seconds"], row["sha256_seconds"])
    stays = row["plan_bytes"]
    ready = row["ready_seconds"] / (1.3 * bound + 8)
    bars = [
        Bar("ready, over 1.3 times the longer of a read and a hash, + 8 s", "<=", 1.0, ready),
        Bar("peak over what check --plan says stays", "<=", 1.1, row["peak_bytes_after"] / stays),
    ]
    if "transformers_tokens_per_second" in row:
        for name in ("agree", "miss"):
            share = row[f"{name}_over_base"] / row[f"{name}_limit"]
            bars.append(Bar(f"X-LoRA over base, drafts {name}, over the limit of bytes", ">=", 0.95, share))
        over = row["agree_tokens_per_second"] / row["transformers_tokens_per_second"]
        bars.append(Bar("X-LoRA over transformers' plain base", ">=", 1.0, over))
    return bars


def demo_rates() -> list[float]:
    """How often the demo's drafts agree on held-out questions, as its draft layer says."""
    layer = load_checkpoint(DEMO).draft_layer
    return [LOOKAHEAD_RATE] if layer is None else layer.agreement.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths")
    parser.add_argument(
        "--bundle", type=Path, help="where the bundle is, or is made and kept; default: a temporary one"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rates", type=float, nargs="+", help="of right drafts, by depth; default: as the demo says")
    parser.add_argument("--engine-only", action="store_true", help="measure the engine alone")
    parser.add_argument("--captured", action="store_true", help="run steps in static buffers, as on a GPU")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to which every row is added as it comes")
    parser.add_argument("flags", nargs="*", help="flags of serve, after --")
    args = parser.parse_args()
    flags = [*args.flags, *(["--quantization", args.quantization] if args.quantization else [])]
    flags += ["--device", args.device]
    with tempfile.TemporaryDirectory() as work:
        path = args.bundle or Path(work) / "bundle"
        args.rates = args.rates or demo_rates()
        if not path.exists():
            make(path, args.layers, args.scale, len(args.rates))
        row = measured(args, path, None if args.engine_only else flags)
    bars = bars_of(row) if args.device == "cpu" and not args.engine_only else []
    emit({"benchmark": "real_size", "flags": flags, "threads": args.threads, "rows": [row]}, bars)


def measured(args: argparse.Namespace, path: Path, flags: list[str] | None) -> dict[str, Any]:
    """The one row, of which every part is noted when it is there."""
    row: dict[str, Any] = {"layers": args.layers, "device": args.device}

    def add(part: dict[str, Any]) -> None:
        row.update(part)
        print_row(part)
        note(args.results, {"section": "real_size", **part})

    if args.device == "cpu":
        options = EngineOptions(str(path), quantization=args.quantization)
        plan = plan_for(read_checkpoint(options), options, None)
        stays = plan.weights.total + plan.pool_bytes + PROCESS_BYTES
        add({"dtype": plan.dtype, "max_model_len": plan.max_model_len, "plan_bytes": stays})
    if flags is not None:
        add(loading(path, args.device, flags))
    captured = args.captured or args.device == "cuda"
    rates = {**AGREE_AND_MISS, "lookahead": args.rates[:1], "drafts": args.rates}
    engines, model, seconds = engines_of(path, args.device, args.quantization, rates, captured=captured)
    add({"load_seconds": seconds})
    use_threads(args.threads, engines.values())
    add(decoding(engines, rates, args.tokens, args.repeats) | byte_limits(model))
    add(predicted(engines, rates, args.tokens))
    if args.device == "cuda":
        add({"gpu_peak_bytes": torch.cuda.max_memory_allocated()})
    del engines, model
    gc.collect()
    if args.quantization is None:
        add(transformers_side(path / "base", args.device, args.tokens, args.repeats))
    if flags is None:
        add(loading(path, args.device, None))
    return row


if __name__ == "__main__":
    main()
