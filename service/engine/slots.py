"""Slots of the KV pool: the places of positions' keys, values and gate rows, by their blocks. No torch."""

from __future__ import annotations

from service.engine.sequence import Sequence, Stream


def stream_slots(stream: Stream, start: int, count: int, block_size: int) -> list[int]:
    """Slots of positions start .. start + count of a stream."""
    blocks = stream.blocks
    if count == 1:
        return [blocks[start // block_size] * block_size + start % block_size]
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, start + count)]


def gate_slots(sequence: Sequence, start: int, count: int, block_size: int) -> list[int]:
    """Slots of the gate rows that positions start .. start + count use, in the real stream's blocks. Positions behind a
    frozen gate all use the last gate row.
    """
    real, end = sequence.real, start + count
    if end <= sequence.gate_end:
        return stream_slots(real, start, count, block_size)
    frozen = max(start, sequence.gate_end)
    [slot] = stream_slots(real, max(0, sequence.gate_end - 1), 1, block_size)
    return [*stream_slots(real, start, frozen - start, block_size), *[slot] * (end - frozen)]
