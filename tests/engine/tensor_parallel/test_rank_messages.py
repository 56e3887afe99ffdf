"""A step as rank 0 sends it and as the others read it."""

from __future__ import annotations

import pytest
import torch

from service.engine.tensor_parallel.rank_messages import pack, pack_batch, unpack, unpack_batch
from service.model.batch import AttentionGroup, Batch, GateParameters, GivenGateRows
from tests.support.tiny import CPU

SITES, EXPERTS = 5, 3


def batch(rows: int, *, steered: bool, given: int) -> Batch:
    lines = torch.randint(1 << 40, (6, rows))
    made = Batch(lines, rows // 2, torch.arange(rows - 1), [], scaling_rows_are_gated=bool(given))
    first = made.positions[: rows - 1]
    made.groups = [
        AttentionGroup(0, 1, rows - 1, first[None], torch.randint(99, (1, 4)), keys=13, needs_mask=True),
        AttentionGroup(rows - 1, 1, 1, made.positions[-1:, None], torch.randint(99, (1, 2)), keys=8, needs_mask=False),
    ]
    if steered:
        made.parameters = GateParameters(
            torch.rand(rows), torch.randint(4, (rows,)), torch.rand(rows, EXPERTS) > 0.5, torch.rand(rows)
        )
    if given:
        made.given = GivenGateRows(torch.randint(99, (given,)), torch.randn(given, SITES, EXPERTS))
    return made


@pytest.mark.parametrize("rows", [2, 3, 123])  # 123 is a brace, with which control messages begin
@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("steered", [False, True])
def test_a_step_arrives_as_it_was(rows: int, given: int, steered: bool) -> None:
    sent = batch(rows, steered=steered, given=given)
    frame = pack_batch(sent)
    assert unpack(frame) is None
    found = unpack_batch(frame, torch.Size([SITES, EXPERTS]), CPU)
    assert torch.equal(found.fields, sent.fields)
    assert torch.equal(found.logit_rows, sent.logit_rows)
    assert (found.num_scaling_rows, found.scaling_rows_are_gated) == (rows // 2, bool(given))
    for ours, theirs in zip(found.groups, sent.groups, strict=True):
        assert torch.equal(ours.block_table, theirs.block_table)
        assert torch.equal(ours.positions, theirs.positions)
        fields = ("start", "segments", "queries", "keys", "needs_mask")
        assert [getattr(ours, name) for name in fields] == [getattr(theirs, name) for name in fields]
    assert (found.parameters is None, found.given is None) == (not steered, not given)
    if sent.parameters is not None and found.parameters is not None:
        for one, other in zip(found.parameters.tensors(), sent.parameters.tensors(), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    if sent.given is not None and found.given is not None:
        assert torch.equal(found.given.slots, sent.given.slots)
        assert torch.equal(found.given.rows, sent.given.rows)


def test_control_messages_are_no_steps() -> None:
    assert unpack(pack({"allocate": 7})) == {"allocate": 7}
