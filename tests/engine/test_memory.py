"""Nothing leaks: blocks and resident memory after thousands of requests with random lengths and random aborts."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.loader import load_engine
from tests.support.bundles import make_bundle

ROOT = Path(__file__).parents[2]


def churn(engine: Engine, requests: int, rng: random.Random) -> None:
    """Runs `requests` requests, about 24 at once; a quarter is aborted at a random moment."""
    started, open_requests = 0, []
    while started < requests or engine.has_work():
        while started < requests and len(open_requests) < 24:
            prompt = [rng.randrange(2, 300) for _ in range(rng.randint(1, 60))]
            name = str(started)
            sampling = SamplingParams(max_tokens=rng.randint(1, 24), temperature=rng.choice([0.0, 1.0]), seed=started)
            engine.add(Request(name, prompt, sampling, rng.choice(["none", "mean", "full"])))
            open_requests.append(name)
            started += 1
        ended = {output.request_id for output in engine.step().outputs if output.finish_reason is not None}
        if open_requests and rng.random() < 0.3:
            victim = rng.choice(open_requests)
            engine.abort(victim)
            ended.add(victim)
        open_requests = [name for name in open_requests if name not in ended]


def soak(bundle: str) -> None:
    """Prints resident bytes after 1,000 and after 2,000 requests; blocks must all be back both times."""
    engine = load_engine(EngineOptions(bundle, kv_memory_bytes=8 << 20, threads=1))
    rng = random.Random(0)
    for _ in range(2):
        churn(engine, 1000, rng)
        engine.check_integrity()
        assert engine.blocks.used == 0
        print(psutil.Process().memory_info().rss)


def weight_bytes(bundle: str) -> None:
    """Prints the bytes of all tensors alive after loading, and of base, stacks, classifier and cache."""
    engine = load_engine(EngineOptions(bundle, kv_memory_bytes=8 << 20))
    gc.collect()
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if _is_tensor(tensor)]
    alive = {storage.data_ptr(): storage.nbytes() for storage in storages}
    model, cache = engine.runner.model, engine.runner.kv_cache
    needed = [*model.causal_lm.parameters(), *model.causal_lm.buffers(), *model.classifier.parameters()]
    needed += [*cache.keys, *cache.values, cache.gate_rows]
    print(sum(alive.values()), sum({t.data_ptr(): t.nbytes for t in needed}.values()))


def _is_tensor(value: object) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def run_here(*calls: str) -> list[int]:
    """Runs functions of this module in a process of its own, and returns the numbers they print."""
    code = "; ".join(["import tests.engine.test_memory as here", *(f"here.{call}" for call in calls)])
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return [int(word) for word in finished.stdout.split()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What one process prints: it has to load everything that an engine imports."""
    folder = tmp_path_factory.mktemp("memory")
    large = make_bundle(folder / "large", hidden=128, layers=4, ranks=32)
    small = make_bundle(folder / "small", layers=1)
    return run_here(f"weight_bytes({str(large)!r})", f"soak({str(small)!r})")


def test_weights_are_held_once(found: list[int]) -> None:
    """Experts stacked, and not also as they were on disk."""
    alive, needed, *_ = found
    assert needed <= alive <= needed * 1.01


def test_blocks_and_memory_return_after_two_thousand_requests(found: list[int]) -> None:
    """A request that ends, however it ends, leaves nothing behind."""
    *_, halfway, after = found
    assert after <= halfway * 1.02
