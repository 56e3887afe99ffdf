"""The operators of the native step against torch and the reference."""

from __future__ import annotations

import shutil
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.checkpoint import DraftLayerWeights
from service.model.draft_layer import EPS, DraftLayer
from service.model.gate import Gate
from service.native import operators
from tests.model.test_classifier import E, H, build
from tests.model.test_draft_head import HIDDEN, SIZE, head_of
from tests.support.bundles import make_draft_head

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")

TOLERANCE = 2e-5
DRAFTS = make_draft_head(HIDDEN, SIZE, torch.Generator().manual_seed(0))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """To the scale of what is expected, in double precision."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(ours.double() / scale, expected / scale, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 32])
def test_linear(threads: int, rows: int, stored: torch.dtype) -> None:
    """Every number of rows left over, widths and depths that no vector divides, experts on all, some and no rows."""
    for width, depth, rank in product((1, 12, 50, 193), (3, 8, 40), (0, 1, 7, 60)):
        x, weight = torch.randn(rows, depth), torch.randn(width, depth).to(stored)
        for bias, first in product((None, torch.randn(width)), {0, rows // 2, rows}):
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            a, b_t = torch.randn(rank, depth).to(stored), torch.randn(rank, width).to(stored)
            gate = torch.randn(rows - first, 3 * rank)[:, rank : 2 * rank]  # as Gate.at cuts it
            stack = (a, b_t, gate) if rank else (None, None, None)
            if rank:
                expected[first:] += (F.linear(x[first:].double(), a.double()) * gate.double()) @ b_t.double()
            assert_close(operators.linear(x, weight, bias, *stack, first), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 16, 35, 300])
def test_large_weights(threads: int, rows: int, stored: torch.dtype) -> None:
    """Such as come from memory, and rows too long for the nearest cache."""
    width, depth, rank = 590, 2030, 5  # what is left of 2030 is some vectors and some numbers
    x, weight = torch.randn(rows, depth), torch.randn(width, depth).to(stored)
    a, b_t, gate = torch.randn(rank, depth), torch.randn(rank, width), torch.randn(rows, rank)
    expected = F.linear(x.double(), weight.double()) + (F.linear(x.double(), a.double()) * gate.double()) @ b_t.double()
    assert_close(operators.linear(x, weight, None, a, b_t, gate), expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 16, 43])
def test_stored_in_bfloat16(native_kernels: None, rows: int) -> None:
    """Every mixture of weights and experts stored so and not gives what float32 gives."""
    for depth in (3, 16, 40, 200, 1048):
        x, weight = torch.randn(rows, depth), torch.randn(50, depth).bfloat16()
        a, b_t, gate = torch.randn(7, depth).bfloat16(), torch.randn(7, 50).bfloat16(), torch.rand(rows, 7)
        expected = operators.linear(x, weight.float(), None, a.float(), b_t.float(), gate)
        for own in (weight, weight.float()):
            for stack in ((a, b_t), (a.float(), b_t.float())):
                ours = operators.linear(x, own, None, *stack, gate)
                torch.testing.assert_close(ours, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("depth", [3, 8, 37, 192])
def test_norm(native_kernels: None, depth: int) -> None:
    x, weight = 10 * torch.randn(5, depth), torch.randn(depth)
    x[3] = 0
    expected = F.rms_norm(x.double(), (depth,), weight.double(), 1e-5)
    torch.testing.assert_close(operators.norm(x, weight, 1e-5).double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("first_row", [0, 2, 5])
def test_spread(native_kernels: None, first_row: int, layerwise: bool) -> None:
    """What Gate makes of stored rows with torch's operators."""
    ranks = [[3, 0, 17], [1, 2, 0], [0, 0, 0], [30, 1, 1]]
    gate = Gate(ranks, layerwise=layerwise, dtype=torch.float32, device=torch.device("cpu"))
    gate.global_scaling_weight = 0.7
    stored, slots = torch.randn(9, 4 if layerwise else 1, 3), torch.tensor([4, 4, 0, 8, 2, 7])
    gate.set(stored.index_select(0, slots[first_row:]), first_row)
    expected = torch.cat([gate.at(site) for site in range(len(ranks))], 1)
    ours = operators.spread(stored, slots, gate.rank_index, first_row, 0.7)
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    gate.open(ours, first_row)
    assert (gate.active, gate.first_row) == (True, first_row)
    assert torch.equal(gate.at(3), ours[:, gate.offset(3) :])


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("depth", "xlora"),
    [
        (1, {}),
        (2, {"softmax_temperature": 0.3}),
        (3, {"enable_softmax": False}),
        (4, {"enable_relu_and_dropout": False, "layerwise_scalings": False}),
    ],
    ids=str,
)
def test_scalings(native_kernels: None, depth: int, xlora: dict[str, Any], bias: bool, rows: int) -> None:
    """What Classifier computes, and its scalings where they are stored; no other slot changes."""
    classifier, _ = build(xlora_depth=depth, use_bias=bias, **{"enable_relu_and_dropout": True, **xlora})
    hidden = 30 * torch.randn(7, H)  # some logits far apart
    stored, slots = torch.full((9, classifier.stored_sites, E), float("nan")), torch.tensor([8, 0, 5, 3, 1, 2, 4])
    logits, scalings = operators.scalings(
        *(hidden, classifier.tensors, classifier.config.enable_relu_and_dropout, classifier.softmax_temperature),
        *(stored, slots, rows),
    )
    expected = classifier.logits(hidden[:rows])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scalings, classifier.scalings(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored[slots[:rows]], scalings, atol=0, rtol=0)
    assert stored[slots[rows:]].isnan().all()


@pytest.mark.parametrize(
    ("scaling_rows", "wanted"),
    [(1, [1, 0]), (0, [0, 2, 1]), (5, [4, 0, 3]), (2, [4, 1, 2, 0]), (3, []), (4, [6, 2, 2, 5, 3, 1, 0])],
)
def test_drafting(native_kernels: None, scaling_rows: int, wanted: list[int]) -> None:
    """Rows in any order, some twice, none that draft, none at all."""
    hidden, rows, head = torch.randn(7, HIDDEN), torch.tensor(wanted, dtype=torch.int64), head_of(DRAFTS)
    ours = operators.drafting(hidden, rows, scaling_rows, head.tensors)
    expected = head(hidden, (torch.arange(7) < scaling_rows).long()).index_select(0, rows)
    torch.testing.assert_close(ours, expected)
    real = rows >= scaling_rows
    assert torch.equal(ours[real], hidden[rows[real]])


def test_drafting_of_what_does_not_fit_is_an_error(native_kernels: None) -> None:
    """Memory is not read as what it is not."""
    hidden, rows, good = torch.randn(2, HIDDEN), torch.tensor([0, 1]), head_of(DRAFTS).tensors
    operators.drafting(hidden, rows, 1, good)
    for number in range(3):
        for wrong in (good[number].double(), torch.randn(5, 3), torch.empty(0)):
            with pytest.raises(RuntimeError, match="fitting shapes"):
                operators.drafting(hidden, rows, 1, [*good[:number], wrong, *good[number + 1 :]])
    for missing in ([0, 2], [-1, 1]):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.drafting(hidden, torch.tensor(missing), 1, good)
    for bad in ((hidden[:, 1:], rows, 1, good), (hidden, rows.int(), 1, good), (hidden, rows, 1, good[:2])):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.drafting(*bad)


HEADS, KV_HEADS, HEAD_DIM, BLOCK, DEPTH = 4, 2, 8, 4, 3


def draft_layer() -> DraftLayer:
    """A random one, of another width than the state's."""
    shapes = {
        "mix": (HIDDEN, 2 * HIDDEN), "depths": (DEPTH - 1, HIDDEN), "query": (HEADS * HEAD_DIM, HIDDEN),
        "output": (HIDDEN, HEADS * HEAD_DIM), "up": (21, HIDDEN), "bias": (21,), "down": (HIDDEN, 21),
    }  # fmt: skip
    weights = {name: (torch.randn(shape) / 4).bfloat16() for name, shape in shapes.items()}
    made = DraftLayerWeights(**weights, agreement=torch.ones(DEPTH))
    return DraftLayer(made, HEAD_DIM, device=torch.device("cpu"), dtype=torch.float32)


def draft_arguments(rows: int, stored: torch.dtype) -> tuple[DraftLayer, list[Any]]:
    """A layer, and what operators.draft_state takes for so many rows of streams of different lengths."""
    layer = draft_layer()
    mix, query, output, up, down = (
        getattr(layer, name).to(stored) for name in ("mix", "query", "output", "up", "down")
    )
    tensors = [mix, layer.depths[1], torch.ones(HIDDEN), query, output, up, layer.bias, down]
    positions = torch.tensor([3 * row % 11 for row in range(rows)])
    table = torch.stack([torch.randperm(6)[:3] for _ in range(rows)])
    keys, values = torch.randn(2, 6, BLOCK, KV_HEADS, HEAD_DIM)
    angles = torch.randn(rows, HEAD_DIM // 2).repeat(1, 2)
    rotation = (angles.cos(), angles.sin())
    state, embedded = torch.randn(2, rows, HIDDEN)
    return layer, [state, embedded, tensors, rotation, keys, values, positions, table, EPS]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_draft_state(threads: int, rows: int, stored: torch.dtype) -> None:
    """DraftLayer over keys that are gathered and softmax as it is written, whatever stands behind the last position."""
    layer, arguments = draft_arguments(rows, stored)
    state, embedded, _, rotation, keys, values, positions, table, _ = arguments

    def attend(asked: Tensor) -> Tensor:
        found = torch.empty_like(asked)
        for row, (position, blocks) in enumerate(zip(positions.tolist(), table, strict=True)):
            key, value = (pool[blocks].flatten(0, 1)[: position + 1] for pool in (keys, values))
            for head in range(HEADS):
                own = head // (HEADS // KV_HEADS)
                weights = (key[:, own] @ asked[row, head] / HEAD_DIM**0.5).softmax(0)
                found[row, head] = weights @ value[:, own]
        return found

    for turn in (rotation, None):
        expected = layer(state, embedded, 2, turn, attend)
        arguments[3] = turn
        assert_close(operators.draft_state(*arguments), expected.double())


def test_a_draft_state_of_what_does_not_fit_is_an_error(native_kernels: None) -> None:
    """Memory is not read as what it is not."""
    _, good = draft_arguments(2, torch.float32)
    operators.draft_state(*good)
    for number, wrong in (
        (0, good[0][:1]), (1, good[1][:, 1:]), (2, good[2][:7]), (3, (good[3][0][:1], good[3][1])),
        (4, good[4].double()), (5, good[5][:3]), (6, good[6].int()), (6, good[6][:1]), (7, good[7][:1]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.draft_state(*good[:number], wrong, *good[number + 1 :])
    for number in range(8):
        tensors = [*good[2][:number], torch.randn(5, 3), *good[2][number + 1 :]]
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.draft_state(*good[:2], tensors, *good[3:])


def test_what_does_not_fit_is_an_error(threads: int) -> None:
    """Of another dtype, or another width: the caller is told, and memory is not read as what it is not."""
    x, weight = torch.randn(2, 8), torch.randn(8, 8)
    a, b_t, gate = torch.randn(3, 8), torch.randn(3, 8), torch.randn(2, 3)
    operators.linear(x, weight, None, a, b_t, gate)
    linears: list[tuple[Any, ...]] = [
        *((x, wrong) for wrong in (weight.half(), weight.double(), weight.T, torch.randn(8, 9), torch.empty(0))),
        *((wrong, weight) for wrong in (x.half(), x.bfloat16(), x[None], x.T, torch.randn(2, 9))),
        *((x, weight, wrong) for wrong in (torch.randn(7), torch.randn(8, 1), torch.randn(8).double())),
        *((x, weight, None, a, wrong, gate) for wrong in (torch.randn(3, 7), torch.randn(2, 8), b_t.bfloat16(), None)),
        *((x, weight, None, a, b_t, torch.randn(rows, 3), first) for first, rows in ((0, 1), (0, 3), (-1, 3), (3, 0))),
        (x, weight, None, a, b_t, torch.randn(2, 2)),
        (x, weight, None, a, b_t, None),
    ]
    for given in linears:
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.linear(*given)
    for wrong in (torch.randn(8).bfloat16(), torch.randn(9)):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.norm(x, wrong, 1e-5)
    stored, slots, index = torch.zeros(4, 2, 3), torch.tensor([1, 2]), torch.tensor([0, 5])
    for one, own in ((stored.double(), slots), (stored, slots.int()), (stored[:, :, :2], slots), (stored[0], slots)):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.spread(one, own, index, 0, 1.0)
    for first_row in (-1, 3):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.spread(stored, slots, index, first_row, 1.0)
    last, none = torch.randn(6, 8), torch.empty(0)
    for layers, hidden, rows in (
        ([last, torch.randn(5)], x, 1),
        ([last, torch.randn(12)[::2]], x, 1),
        ([last[:5], none], x, 1),
        ([last, none], x[:, :7].contiguous(), 1),
        ([last, none], x, 3),
        ([last.double(), none], x, 1),
        ([], x, 1),
    ):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.scalings(hidden, layers, True, 1.0, stored, slots, rows)
    assert not stored.any()


def test_drafts_of_what_does_not_fit_are_an_error(native_kernels: None) -> None:
    """Memory is not read as what it is not, nor behind the embeddings and the rotations."""
    layer, (state, _, tensors, _, keys, values, positions, table, eps) = draft_arguments(2, torch.float32)
    tokens, embedding = torch.tensor([0, 4]), torch.randn(5, HIDDEN)
    rotations = list(torch.randn(2, 16, HEAD_DIM))
    places = [keys, values, positions, table]
    good = [state, tokens, embedding, tensors, layer.depths, *rotations, *places, embedding, None, None, None]
    drafts = operators.drafts(*good, eps, DEPTH)
    assert drafts.shape == (2, DEPTH - 1)
    assert ((drafts >= 0) & (drafts < 5)).all()
    for number, wrong in (
        (0, state[:1]), (1, torch.tensor([0, 5])), (1, torch.tensor([0, -1])), (2, embedding.double()),
        (3, tensors[:7]), (4, layer.depths[:1]), (5, rotations[0][:2]), (6, rotations[1][:3]),
        (9, positions + 14), (10, table[:1]), (11, embedding[:, 1:]), (12, torch.randn(3)), (13, torch.ones(2)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fitting shapes"):
            operators.drafts(*good[:number], wrong, *good[number + 1 :], eps, DEPTH)
