"""Defaults that fit: dtype, context and KV pool by the memory there is, and refusals that say what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.checkpoint import Checkpoint, load_checkpoint
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.engine import cgroups, memory_plan
from service.engine.defaults import resolve_options, summarise
from service.engine.loader import bfloat16_tensors, load_engine
from service.engine.machine import Memory, host_memory
from service.engine.memory_plan import MEMORY_FRACTION, MemoryPlan
from tests.support.bundles import make_bundle

CPU = torch.device("cpu")
MIB = 1 << 20
PROCESSES = MIB
V1_NONE = "9223372036854771712"  # what cgroup v1 says where there is no limit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Some 11 MB of linears in bfloat16, half a megabyte of KV memory for 1,024 tokens, made for 8,192 tokens."""
    path = tmp_path_factory.mktemp("defaults") / "bundle"
    full = {"intermediate_size": 20_000, "max_position_embeddings": 8192}
    return load_checkpoint(make_bundle(path, hidden=64, base_config=full, dtype=torch.bfloat16), examine_weights=False)


@pytest.fixture(autouse=True)
def small_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "PROCESS_BYTES", PROCESSES)


UNSAID = EngineOptions("any")


def settled(
    checkpoint: Checkpoint, total: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[EngineOptions, MemoryPlan]:
    """Settle options on a machine with `total` bytes."""
    monkeypatch.setattr(memory_plan, "host_memory", lambda: Memory(total, "the container"))
    chosen = EngineOptions(str(checkpoint.path), "cpu", **options)
    return resolve_options(checkpoint, chosen, CPU, None, bfloat16_tensors)


def test_where_there_is_room_the_context_is_the_bases(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    options, plan = settled(checkpoint, 4096 * MIB, monkeypatch)
    assert (options.dtype, options.max_model_len) == ("float32", 8192)
    assert plan.stored_dtypes[0] == "bfloat16"
    assert "texts of 8,192 tokens: weights" in summarise(plan, UNSAID)


def test_the_context_is_the_longest_that_fits(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 80 % of the memory; one more block a stream would be over."""
    weights = settled(checkpoint, 4096 * MIB, monkeypatch)[1].weights.total
    total = int((weights + 1.5 * MIB) / MEMORY_FRACTION)
    options, plan = settled(checkpoint, total, monkeypatch)
    assert options.dtype == "float32"
    assert options.max_model_len == plan.max_model_len
    assert 1024 < plan.max_model_len < 8192
    assert plan.max_model_len % plan.block_size == 0
    block_bytes = (plan.kv_slot_bytes + plan.gate_row_bytes) * plan.block_size
    assert options.kv_memory_bytes == plan.num_blocks * block_bytes
    left = int(total * MEMORY_FRACTION) - weights
    assert plan.num_blocks * block_bytes <= left < plan.num_blocks * block_bytes + 2 * block_bytes
    assert "the longest that fit (the base takes 8,192)" in summarise(plan, UNSAID)


def test_an_operator_may_ask_for_more_than_the_share(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is refused by the arithmetic where that is more than there is."""
    weights = settled(checkpoint, 4096 * MIB, monkeypatch)[1].weights.total
    total = int((weights + 1.5 * MIB) / MEMORY_FRACTION)
    options, plan = settled(checkpoint, total, monkeypatch, max_model_len=8192)
    assert options.max_model_len == 8192
    assert "the longest that fit" not in summarise(plan, EngineOptions("any", max_model_len=8192))
    tight = weights + PROCESSES + MIB
    with pytest.raises(StartupError, match=r"one request of 8192 tokens needs .* the container has") as refused:
        settled(checkpoint, tight, monkeypatch, max_model_len=8192)
    assert refused.value.hint is not None
    most = int(refused.value.hint.split("--max-model-len ")[1].split()[0])
    assert settled(checkpoint, tight, monkeypatch, max_model_len=most)[0].max_model_len == most
    with pytest.raises(StartupError):
        settled(checkpoint, tight, monkeypatch, max_model_len=most + 16)


def test_a_pool_of_the_operators_size(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken at its word, as far as there is so much."""
    weights = settled(checkpoint, 4096 * MIB, monkeypatch)[1].weights.total
    options, plan = settled(checkpoint, 4096 * MIB, monkeypatch, kv_memory_bytes=2 * MIB)
    assert 1024 < plan.max_model_len < 8192
    assert (options.kv_memory_bytes or 0) <= 2 * MIB
    with pytest.raises(StartupError, match=r"one request of 1024 tokens needs .* there are 0 MiB"):
        settled(checkpoint, 4096 * MIB, monkeypatch, kv_memory_bytes=MIB // 4)
    total = int((weights + MIB) / MEMORY_FRACTION)
    with pytest.raises(StartupError, match=r"--kv-memory 64.* MiB more; the container has") as refused:
        settled(checkpoint, total, monkeypatch, kv_memory_bytes=64 * MIB)
    assert refused.value.hint == "lower --kv-memory, or leave it out"


def test_float32_gives_way_to_the_stored_dtype(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels that read bfloat16, float32 takes twice the memory."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    elsewhere = {"native_cache": "/nonexistent"}
    full = settled(checkpoint, 4096 * MIB, monkeypatch, **elsewhere)[1]
    assert full.dtype == "float32"
    half = settled(checkpoint, 4096 * MIB, monkeypatch, dtype="bfloat16")[1]
    total = int((half.weights.total + 4 * MIB) / MEMORY_FRACTION)
    options, plan = settled(checkpoint, total, monkeypatch, **elsewhere)
    assert (options.dtype, plan.dtype) == ("bfloat16", "bfloat16")
    with pytest.raises(StartupError, match="the weights need") as refused:
        settled(checkpoint, total, monkeypatch, dtype="float32", **elsewhere)
    assert refused.value.hint == "this fits: --dtype bfloat16"


def test_what_fits_is_named_and_fits(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = settled(checkpoint, 4096 * MIB, monkeypatch, dtype="bfloat16")[1].weights.total
    total = int(0.75 * weights / MEMORY_FRACTION)
    with pytest.raises(StartupError, match="the weights need") as refused:
        settled(checkpoint, total, monkeypatch)
    assert refused.value.hint == "this fits: --quantization int8"
    options, plan = settled(checkpoint, total, monkeypatch, quantization="int8")
    assert plan.quantization == "int8"
    assert options.dtype == "bfloat16"
    with pytest.raises(StartupError) as refused:
        settled(checkpoint, int(0.1 * weights / MEMORY_FRACTION) + PROCESSES, monkeypatch)
    assert str(refused.value.hint).startswith("nothing does: the least that its weights can take is")


def test_the_engine_takes_what_was_chosen(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = settled(checkpoint, 4096 * MIB, monkeypatch)[1].weights.total
    lines: list[str] = []
    total = int((weights + 1.5 * MIB) / MEMORY_FRACTION)
    _, plan = settled(checkpoint, total, monkeypatch)
    engine = load_engine(EngineOptions(str(checkpoint.path), "cpu", threads=1), lines.append)
    assert engine.info.max_model_len == plan.max_model_len
    assert engine.info.kv_blocks_total == plan.num_blocks
    assert summarise(plan, UNSAID) in lines
    assert lines.index(summarise(plan, UNSAID)) < next(
        i for i, line in enumerate(lines) if line.startswith("loading base")
    )


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"memory.max": "1073741824\n"}, 1 << 30),  # v2 in a container, which sees its own cgroup as the root
        ("0::/a/b", {"a/memory.max": "2147483648", "a/b/memory.max": "max"}, 2 << 30),  # v2, a limit further out
        ("5:cpu:/\n4:memory:/docker/x", {"memory/memory.limit_in_bytes": "536870912"}, 512 * MIB),  # v1 in a container
        ("4:memory:/k/x", {"memory/k/memory.limit_in_bytes": V1_NONE, "memory/k/x/memory.limit_in_bytes": "99"}, 99),
        ("4:memory:/", {"memory/memory.limit_in_bytes": V1_NONE}, None),
        ("0::/", {"memory.max": "max"}, None),
        ("", {}, None),
    ],
)
def test_a_containers_limit_is_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cgroups, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN_CGROUPS", tmp_path / "own")
    memory = host_memory()
    assert memory.origin == ("this machine" if expected is None else "the container")
    assert expected in (None, memory.total)
