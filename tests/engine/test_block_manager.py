"""The accounts of the KV pool under random use."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.block_manager import BlockManager

BLOCKS, SIZE = 12, 4
operations = st.lists(
    st.tuples(st.sampled_from(["extend", "share", "release"]), st.integers(0, 5), st.integers(0, 40)), max_size=60
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(operations)
def test_random_use_keeps_integrity(steps: list[tuple[str, int, int]]) -> None:
    """A block handed out twice, lost, or freed while someone still holds it."""
    manager, tables = BlockManager(BLOCKS, SIZE), [list[int]() for _ in range(6)]
    for what, number, amount in steps:
        table = tables[number]
        if what == "extend" and manager.missing(table, amount) <= manager.free:
            before = list(table)
            manager.extend(table, amount)
            assert table[: len(before)] == before
            assert len(table) == max(len(before), -(-amount // SIZE))
        elif what == "share" and not table:
            source = tables[amount % len(tables)]
            tables[number] = manager.share(source[: amount % (len(source) + 1)])
        elif what == "release":
            manager.release(table)
            assert table == []
        manager.check_integrity(tables)
        assert manager.free + manager.used == BLOCKS
        assert manager.used == len({block for table in tables for block in table})
        for table in tables:
            assert len(set(table)) == len(table)
    for table in tables:
        manager.release(table)
    assert manager.free == BLOCKS
    manager.check_integrity([])


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for(positions: int, blocks: int) -> None:
    """Off by one at the border of a block."""
    manager = BlockManager(BLOCKS, SIZE)
    assert manager.blocks_for(positions) == blocks
    assert manager.missing([], positions) == blocks
    assert manager.missing([0, 1, 2], positions) == 0


def test_a_shared_block_outlives_its_first_holder() -> None:
    """The choice that computed the prompt may end first."""
    manager, first = BlockManager(BLOCKS, SIZE), list[int]()
    manager.extend(first, 8)
    second = manager.share(first)
    kept = list(second)
    manager.release(first)
    assert manager.used == 2
    assert second == kept
    manager.release(second)
    assert manager.used == 0


def test_check_integrity_sees_defects() -> None:
    """The check must see a lost, a doubly held and a wrongly freed block, or the other tests prove nothing."""
    manager, table = BlockManager(BLOCKS, SIZE), list[int]()
    manager.extend(table, 8)
    for wrong in ([], [table[:1]], [table, table[:1]], [[*table, 9]]):
        with pytest.raises(RuntimeError):
            manager.check_integrity(wrong)
    manager._free.append(table[0])
    with pytest.raises(RuntimeError):
        manager.check_integrity([table])
