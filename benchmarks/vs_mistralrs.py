"""Against mistral.rs 0.6.0, the last release whose X-LoRA works: the same weights in both, one request, greedy, fp32.

    python -m benchmarks.vs_mistralrs [--tokens 128] [--repeats 3] [--threads N] [--environment DIR]

A Mistral of 4 layers, 256 wide, with eight random experts of rank 16 on every linear: base and X-LoRA guess alike at
chance, so every lookahead draft misses. The classifier has depth 1 (deeper ones run with dropout there). Its modes:

    cached       with its KV cache
    frozen       its tgt_non_granular_index=1: the gate of the first token for all that follow; ours stays exact
    recompute    without a cache

`deficit` tells which of them compute X-LoRA: PEFT reads the text that was written, and this is the most by which a
token's logit stayed under the best one (logits have a standard deviation of 4). Ours has none. Without a cache,
mistral.rs's own arithmetic costs it a few hundredths at near-ties; with one, ten times that.

mistral.rs lives in a virtual environment of its own, made here (network, a minute) where there is none, and runs with
two threads. Between requests it spins, so it is stopped while others run. Rates are of whole requests, with the tokens
each side has written. Not part of `make bench` unless asked for: make bench BENCH=vs_mistralrs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from benchmarks.common import Bar, EngineRun, emit, make_engine, print_row, run_engine
from service.engine.engine import Engine
from tests.support.bundles import ALL_TARGETS, CORPUS, make_bundle
from tests.support.oracle import PeftOracle

_PACKAGE = "mistralrs==0.6.0"
_PEER = Path(__file__).parent / "mistralrs_peer.py"
_ENVIRONMENT = "~/.cache/xlora-serve/mistralrs-0.6.0"
_BARS = {"cached": 6.0, "frozen": 2.5}
_EXACT = "recompute"
_ADAPTER_FIELDS = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules")


def peer_python(folder: Path) -> Path:
    """The Python of the environment that has mistralrs; makes the environment where there is none."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"installing {_PACKAGE} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", _PACKAGE], check=True)
        ready.touch()
    return python


def mistral_bundle(path: Path) -> Path:
    """The model, in our format. Only tokens that the tokenizer has no text for are ever written: mistral.rs prints
    those by number, so that tokens can be compared, and the end of the text is not among them.
    """
    make_bundle(
        path,
        architecture="mistral",
        hidden=256,
        layers=4,
        experts=tuple("abcdefgh"),
        ranks=16,
        alphas=32,
        targets=list(ALL_TARGETS),
        vocab=2048,
        base_config={"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": None},
        xlora={"layerwise_scalings": True, "xlora_depth": 1, "enable_relu_and_dropout": False},
        strength=1.0,
    )
    written = Tokenizer.from_file(str(path / "base" / "tokenizer.json")).get_vocab_size()
    weights = load_file(path / "base" / "model.safetensors")
    weights["lm_head.weight"][:written] = 0
    save_file(weights, path / "base" / "model.safetensors", {"format": "pt"})
    manifest = json.loads((path / "bundle.json").read_text())
    del manifest["sha256"]  # of the weights before
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def convert(bundle: Path, folder: Path) -> dict[str, str]:
    """The same weights in mistral.rs's layout. Returns its three paths: base, experts, ordering."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    base, experts, ordering = folder / "base", folder / "experts", folder / "ordering.json"
    shutil.copytree(bundle / "base", base)
    _update(base / "config.json", rope_theta=10000.0, torch_dtype="float32", sliding_window=None)
    shutil.copytree(bundle / "classifier", experts)
    names = [f"adapter_{number}" for number in range(len(manifest["experts"]))]
    _update(experts / "xlora_config.json", base_model_id=str(base), adapters=names)
    for name, expert in zip(names, manifest["experts"], strict=True):
        source = bundle / expert["path"]
        shutil.copy(source / "adapter_model.safetensors", experts / f"{name}.safetensors")
        config = json.loads((source / "adapter_config.json").read_text())
        (experts / f"{name}.json").write_text(json.dumps({key: config[key] for key in _ADAPTER_FIELDS}))
    layers = {site: number for number, site in enumerate(manifest["sites"])}
    ordering.write_text(json.dumps({"base_model_id": str(base), "order": names, "layers": layers}))
    return {"base": str(base), "experts": str(experts), "ordering": str(ordering)}


def _update(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class Peer:
    """A running mistral.rs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def generate(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Seconds, text and number of prompt tokens. Raises RuntimeError where mistral.rs has died."""
        self._process.send_signal(signal.SIGCONT)
        self.send({"prompt": prompt, "tokens": tokens})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"seconds"'):
                self._process.send_signal(signal.SIGSTOP)
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"mistral.rs ended with exit code {self._process.wait()}")

    def send(self, message: dict[str, Any]) -> None:
        """One line."""
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)


@contextmanager
def peer(python: Path, paths: dict[str, str], mode: str) -> Iterator[Peer]:
    """Starts mistral.rs in one mode, and ends it."""
    settings = {"RAYON_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command = [python, _PEER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings
    ) as process:
        running = Peer(process)
        running.send({**paths, "mode": mode})
        try:
            yield running
        finally:
            process.kill()


def token_ids(text: str) -> list[int]:
    """The tokens that mistral.rs has printed by number."""
    return [int(number) for number in re.findall(r"<\[(\d+)\]>", text)]


def compare(
    engine: Engine,
    peers: dict[str, Peer],
    oracle: PeftOracle,
    prompt: str,
    ids: list[int],
    tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """A row per mode: all take turns with ours, medians count."""
    ours: list[EngineRun] = []
    rates: dict[str, list[float]] = {mode: [] for mode in peers}
    written: dict[str, list[int]] = {}
    for _ in range(repeats):
        ours.append(run_engine(engine, [ids], tokens))
        for mode, running in peers.items():
            answer = running.generate(prompt, tokens)
            written[mode] = token_ids(answer["text"])
            rates[mode].append(len(written[mode]) / answer["seconds"])
    rows = []
    rate = tokens / median(run.seconds for run in ours)
    own_deficit = max(deficit(oracle, ids, run.tokens["0"]) for run in ours)
    for mode in peers:
        row = {
            "mode": mode,
            "ours_tokens_per_second": rate,
            "mistralrs_tokens_per_second": median(rates[mode]),
            "ratio": rate / median(rates[mode]),
            "draft_hit_rate": ours[0].draft_hit_rate,
            "deficit": deficit(oracle, ids, written[mode]),
            "own_deficit": own_deficit,
        }
        print_row(row)
        rows.append(row)
    return rows


@torch.inference_mode()
def deficit(oracle: PeftOracle, prompt: list[int], tokens: list[int]) -> float:
    """The most by which the logit of one of `tokens` is under the best one, when PEFT reads them after `prompt`."""
    logits = oracle.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
    return float((logits.amax(-1) - logits[torch.arange(len(tokens)), torch.tensor(tokens)]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads of ours; default: the engine's")
    parser.add_argument("--environment", type=Path, default=Path(_ENVIRONMENT), help="of mistral.rs")
    args = parser.parse_args()
    python = peer_python(args.environment.expanduser())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bundle = mistral_bundle(Path(folder) / "bundle")
        paths = convert(bundle, Path(folder))
        engine = make_engine(bundle, threads=args.threads)
        modes = [*_BARS, _EXACT]
        peers = {mode: stack.enter_context(peer(python, paths, mode)) for mode in modes}
        prompt = " ".join(CORPUS[:3])
        ids = Tokenizer.from_file(str(bundle / "base" / "tokenizer.json")).encode(prompt).ids
        for mode, running in peers.items():
            if running.generate(prompt, 16)["prompt_tokens"] != len(ids):
                raise RuntimeError(f"mistral.rs ({mode}) reads the prompt as other tokens")
        run_engine(engine, [ids], 16)
        rows = compare(engine, peers, PeftOracle(bundle), prompt, ids, args.tokens, args.repeats)
    bars = [
        Bar(f"ours over mistral.rs, {row['mode']}", ">=", _BARS[row["mode"]], row["ratio"])
        for row in rows
        if row["mode"] in _BARS
    ]
    theirs = max(row["deficit"] for row in rows if row["mode"] == _EXACT)
    bars += [
        Bar("our tokens' deficit in PEFT's logits", "<=", 1e-4, max(row["own_deficit"] for row in rows)),
        Bar("... of mistral.rs's tokens, without a cache", "<=", 0.1, theirs),
    ]
    emit({"benchmark": "vs_mistralrs", "threads": torch.get_num_threads(), "rows": rows}, bars)


if __name__ == "__main__":
    main()
