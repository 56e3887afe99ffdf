"""The accounts of the KV pool under random use."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.block_keys import BlockKeys
from service.engine.block_manager import BlockManager, BlockTable, table_of

BLOCKS, SIZE = 12, 4
operations = st.lists(
    st.tuples(st.sampled_from(["extend", "cache", "adopt", "release"]), st.integers(0, 5), st.integers(0, 40)),
    max_size=80,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(operations)
def test_random_use_keeps_integrity(steps: list[tuple[str, int, int]]) -> None:
    """A block handed out twice, lost, freed while someone holds it, or found although it was written again."""
    manager, tables = BlockManager(BLOCKS, SIZE), [table_of() for _ in range(6)]
    contents: dict[int, bytes] = {}  # what a model would have written last
    for number_of_step, (what, number, amount) in enumerate(steps):
        table = tables[number]
        if what == "extend" and manager.missing(table, amount) <= manager.free:
            before = table[:]
            manager.extend(table, amount)
            assert table[: len(before)] == before
            assert len(table) == max(len(before), -(-amount // SIZE))
            contents |= dict.fromkeys(table[len(before) :], b"%d" % number_of_step)
        elif what == "cache" and table:
            block = table[amount % len(table)]
            if block not in manager._keys:
                contents[block] = b"text %d" % (amount % 7)
                manager.cache(block, contents[block])
        elif what == "adopt" and not table:
            keys = [b"text %d" % (amount % 7), b"text %d" % (number % 7)]
            found = manager.find(keys)
            assert [contents[block] for block in found] == keys[: len(found)]
            evictable, free = manager.evictable(set(found)), manager.free
            tables[number] = manager.hold(dict.fromkeys(found))
            assert manager.free == free - evictable
        elif what == "release":
            manager.release(table, tables[(number + 1) % 6])
            assert len(table) == len(tables[(number + 1) % 6]) == 0
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
    assert manager.missing(table_of(), positions) == blocks
    assert manager.missing(table_of([0, 1, 2]), positions) == 0


def cached(manager: BlockManager, *keys: bytes) -> BlockTable:
    """A new table whose blocks are cached under `keys`."""
    table = table_of()
    manager.extend(table, len(keys) * manager.block_size)
    for block, key in zip(table, keys, strict=True):
        manager.cache(block, key)
    return table


def test_a_shared_block_outlives_its_first_holder() -> None:
    """The choice that computed the prompt may end first."""
    manager = BlockManager(BLOCKS, SIZE)
    first = cached(manager, b"a", b"b")
    second = manager.hold(manager.find([b"a", b"b"]))
    kept = second[:]
    manager.release(first)
    assert manager.used == 2
    assert second == kept
    manager.release(second)
    assert manager.used == 0
    assert manager.find([b"a", b"b"]) == list(kept), "a cached block stays findable"


def test_the_longest_unused_goes_first() -> None:
    """A block that was found again is young again; blocks that contain nothing go before all that do."""
    manager = BlockManager(6, SIZE)
    tables = {name: cached(manager, name) for name in (b"a", b"b", b"c", b"d")}
    for name in (b"b", b"a", b"d", b"c"):
        manager.release(tables[name])
    manager.release(manager.hold(manager.find([b"b"])))
    gone, table = [], table_of()
    for number in range(1, 7):
        manager.extend(table, number * SIZE)
        found = [name for name in tables if manager.find([name])]
        gone += [name for name in tables if name not in found and name not in gone]
        assert len(gone) == max(0, number - 2), "the two blocks without contents go first"
    assert gone == [b"a", b"d", b"c", b"b"]
    manager.check_integrity([table])


def test_a_held_block_is_never_evicted() -> None:
    """A long answer must not overwrite the prompt that another request is reading."""
    manager = BlockManager(4, SIZE)
    held = cached(manager, b"a", b"b")
    table = table_of()
    manager.extend(table, manager.free * SIZE)
    assert not set(held) & set(table)
    assert manager.find([b"a", b"b"]) == list(held)
    with pytest.raises(KeyError):
        manager.extend(table, 3 * SIZE)


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    """A block without those before it cannot be used; of two streams, neither is emptied first."""
    manager = BlockManager(6, SIZE)
    scaling, real = cached(manager, b"s0", b"s1", b"s2"), cached(manager, b"r0", b"r1", b"r2")
    manager.release(scaling, real)
    table = table_of()
    for left in (2, 1, 0):
        manager.extend(table, (6 - 2 * left) * SIZE)
        assert len(manager.find([b"s0", b"s1", b"s2"])) == len(manager.find([b"r0", b"r1", b"r2"])) == left


def test_the_same_contents_are_cached_once() -> None:
    """Two requests that computed the same text at the same time: the second's blocks are plain blocks."""
    manager = BlockManager(BLOCKS, SIZE)
    first, second = cached(manager, b"a"), cached(manager, b"a")
    assert manager.find([b"a"]) == list(first)
    manager.release(second)
    manager.release(first)
    manager.check_integrity([])
    assert manager.find([b"a"])


def test_what_is_forgotten_is_not_found_and_not_lost() -> None:
    """Whoever holds it keeps it; then its room is free."""
    manager = BlockManager(BLOCKS, SIZE)
    first = cached(manager, b"a", b"b")
    second = manager.hold(manager.find([b"a"]))
    manager.forget(first)
    assert manager.find([b"a", b"b"]) == []
    manager.check_integrity([first, second])
    again = cached(manager, b"a")
    assert manager.find([b"a"]) == list(again), "the text may be cached anew"
    manager.release(first)
    manager.check_integrity([second, again])
    manager.release(second)
    manager.release(again)
    assert manager.free == BLOCKS


def test_keys_name_everything_before_a_block() -> None:
    """Equal texts have equal keys; another root, another token anywhere before, another engine: other keys."""
    keys = BlockKeys(SIZE)

    def of(tokens: list[int], *identity: object, maker: BlockKeys = keys) -> list[bytes]:
        made: list[bytes] = []
        maker.extend(made, maker.root(*identity), tokens, len(tokens) // SIZE)
        return made

    text = list(range(12))
    assert of(text, "real", "") == of([*text, 99], "real", "")
    assert len(set(of([1] * 12, "real", ""))) == 3
    piecewise: list[bytes] = []
    for count in (1, 3):
        keys.extend(piecewise, keys.root("real", ""), text, count)
    assert piecewise == of(text, "real", "")
    assert of([99, *text[1:]], "real", "")[2] != of(text, "real", "")[2]
    assert len({*of(text, "real", ""), *of(text, "scaling", ""), *of(text, "real", "salt")}) == 9
    assert keys.root("a", "bc") != keys.root("ab", "c")
    assert of(text, "real", "") != of(text, "real", "", maker=BlockKeys(SIZE)), "keys that can be computed outside"


def test_check_integrity_sees_defects() -> None:
    """The check must see a lost, a doubly held and a wrongly freed block, or the other tests prove nothing."""
    manager = BlockManager(BLOCKS, SIZE)
    table = cached(manager, b"a", b"b")
    for wrong in ([], [table[:1]], [table, table[:1]], [table_of([*table, 9])]):
        with pytest.raises(RuntimeError):
            manager.check_integrity(wrong)
    manager.check_integrity([table])
    manager._cached[b"b"] = table[0]
    with pytest.raises(RuntimeError):
        manager.check_integrity([table])
    manager._cached[b"b"] = table[1]
    manager._free.append(table[0])
    with pytest.raises(RuntimeError):
        manager.check_integrity([table])
    manager._free.pop()
    manager.release(table)
    manager._free.append(manager._evictable.popitem()[0])  # findable, and free to be written
    with pytest.raises(RuntimeError):
        manager.check_integrity([])
