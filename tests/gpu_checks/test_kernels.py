"""Every Triton kernel, compiled for GPUs that are not here, in the variants that the service can launch.

That they compute the right numbers is tested in Triton's interpreter (tests/model/attention/test_triton.py).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: `make check-gpu` has it")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

from service.model.attention import triton as paged_triton
from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache, KVLayout
from tests.support.triton_kernels import CHIPS, SHARED_MEMORY, Compiled, attend, compiling_for, kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SAMPLED_HEAD_DIMS = (96, 256)  # three stages in 16 bits, and the largest
QUERIES = (1, 64)
GROUPS, PAGES = (1, 4, 8), (16, 256)
SMALLEST = min(SHARED_MEMORY.values())

Variant = tuple[Any, ...]  # chip, then the arguments of attend()


def variants(*, everything: bool) -> list[Variant]:
    """Every dtype with the head sizes that take most stages and most memory, and `everything`: with every head size on
    every chip, for decoding and prefill, plain and special. What a variant leaves open goes round.
    """
    tiles = list(itertools.product(DTYPES, HEAD_DIMS if everything else SAMPLED_HEAD_DIMS))
    places = list(itertools.product(CHIPS, QUERIES, (False, True)))
    pairs = [(tile, place) for tile in tiles for place in places]
    if not everything:
        pairs = [(tile, places[5 * i % len(places)]) for i, tile in enumerate(tiles)]
    return [
        (chip, *tile, queries, special, GROUPS[i % len(GROUPS)], PAGES[i % len(PAGES)])
        for i, (tile, (chip, queries, special)) in enumerate(pairs)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is compiled here, and nothing of it stays."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def compiled(chosen: list[Variant]) -> Iterator[tuple[Variant, Compiled]]:
    for chip, *variant in chosen:
        with compiling_for(chip) as found:
            attend(*variant)
        for one in found:
            yield (chip, *variant), one


def check(chosen: list[Variant]) -> None:
    """Fails where a kernel does not compile, takes too much shared memory, or was not launched by any variant."""
    seen = set()
    for variant, one in compiled(chosen):
        seen.add(one.kernel)
        assert one.shared_bytes <= SMALLEST, f"{one} of {variant}: a block has {SMALLEST} bytes of shared memory"
    known = {name for _, name in kernels()}
    assert seen == known, f"kernels that no variant launches: {known - seen}"


def test_steps_share_a_kernel() -> None:
    """Views of a step's indices begin anywhere, and their sizes change: nothing is compiled for that while serving."""
    layout = KVLayout(1, 2, 64, 16, 1, 1, torch.bfloat16)
    cache = KVCache.allocate(layout, 64, torch.zeros(1, 1))
    with compiling_for(90) as found:
        for start, segments, width in itertools.product((0, 1), (1, 16), (1, 16, 17)):
            indices = torch.zeros(1 + segments * (1 + width), dtype=torch.int64)[start : start + segments * (1 + width)]
            positions, table = indices[:segments, None], indices[segments:].view(segments, width)
            group = AttentionGroup(0, segments, 1, positions, table, 100, needs_mask=True)
            paged_triton.attend(torch.zeros(segments, 4, 64, dtype=torch.bfloat16), group, 0, cache, 0.1, None, None)
    assert len({one.hash for one in found}) == 1


def test_compiles() -> None:
    check(variants(everything=False))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_all(chip: int) -> None:
    check([variant for variant in variants(everything=True) if variant[0] == chip])


# -- the checks themselves -----------------------------------------------------------------------------------------

ONE = [(90, torch.bfloat16, 256, 64, False, 4, 16), (90, torch.bfloat16, 64, 1, True, 4, 16)]


def test_finds_too_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_triton, "_tiling", lambda *_: (64, 128, 3))
    with pytest.raises(AssertionError, match="shared memory"):
        check(ONE)


def test_finds_a_kernel_that_nobody_launches() -> None:
    with pytest.raises(AssertionError, match="_join_kernel"):
        check(ONE[:1])


def test_finds_kernels_in_the_source(tmp_path: Path) -> None:
    """With arguments of the decorator and without."""
    (tmp_path / "service" / "deep").mkdir(parents=True)
    text = "@triton.jit\ndef one(): ...\n@triton.jit(do_not_specialize=['a'])\ndef two(): ...\ndef three(): ...\n"
    (tmp_path / "service" / "deep" / "new.py").write_text(text)
    assert kernels(tmp_path) == {("service.deep.new", "one"), ("service.deep.new", "two")}
    assert len(kernels()) >= 2
