"""The native step against the same step in operators of torch: one forward of any batch, and whole engines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.contract.output import StepOutput
from service.contract.steering import Steering
from service.engine.engine import Engine
from service.model.batch import AttentionGroup, Batch, GateParameters, GivenGateRows
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.model.xlora_model import XLoraModel
from service.native.decoder import Decoder
from service.native.step import NativeStep
from tests.engine.gate.test_gate_settings import run_mixed
from tests.support.driver import Engines, Run, greedy, run, sampled, words
from tests.support.tiny import Tiny, Variant

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

# -- one forward ------------------------------------------------------------------------------------

BLOCK_SIZE, WIDTH = 4, 90  # positions of a block, blocks of a stream
TOLERANCE = 2e-5
KINDS: dict[str, dict[str, Any]] = {
    "llama, experts on some linears": {"experts": ["a", "b"], "targets": ["q_proj", "v_proj", "down_proj"]},
    "llama, heads no vector divides, biases": {
        "hidden": 36,
        "base_config": {"num_attention_heads": 6, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    },
    "mistral, a window": {"architecture": "mistral", "base_config": {"sliding_window": 7}},
    "experts on embedding and head": {"experts": ["a", "b"], "targets": ["embed_tokens", "lm_head", "v_proj"]},
    "qwen2, some biases": {"architecture": "qwen2"},
    "qwen3, norms of queries and keys": {"architecture": "qwen3"},
}
# Segments of a step: of scaling rows, then of real rows, by how many rows they have.
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "one real row": ([], [1]),
    "one scaling row": ([1], []),
    "a decode step": ([1] * 3, [1] * 4),
    "many rows": ([1] * 60, [1] * 80),
    "drafts": ([3, 1], [1, 1, 4]),
    "a prompt": ([37], []),
    "prompts among decoding requests": ([140, 17, 5, 1, 1], [1, 1, 2, 16, 33, 150]),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.2}
    path = tmp_path_factory.mktemp("native") / "bundle"
    model = Tiny(path, xlora=xlora, strength=0.3, **request.param).as_stored().model()
    with torch.no_grad():  # transformers makes biases zero and norms one
        for name, parameter in model.causal_lm.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def native(model: XLoraModel) -> NativeStep:
    decoder = Decoder.of(model)
    assert decoder is not None
    return NativeStep(model, decoder)


def forward(
    step: Step, model: XLoraModel, scaling: list[int], real: list[int], *, steered: bool = False
) -> tuple[ForwardOutput, KVCache]:
    """A step whose segments end anywhere in their streams, over the same leftovers whichever way it is computed;
    steered rows lie among others, and the first row's gate is given.
    """
    generator = torch.Generator().manual_seed(len(scaling) + 100 * len(real))
    counts = [*scaling, *real]
    rows, scaling_rows = sum(counts), sum(scaling)
    cache = KVCache.allocate(model.kv_layout(BLOCK_SIZE), len(counts) * WIDTH, model.dummy_row)
    for pool in (*cache.keys, *cache.values):
        pool.normal_(generator=generator)
    cache.gate_rows[:-1].uniform_(generator=generator)
    tables = torch.randperm(len(counts) * WIDTH, generator=generator).view(len(counts), WIDTH)
    starts = [int(torch.randint(WIDTH * BLOCK_SIZE - count, (), generator=generator)) for count in counts]
    groups, positions, slots, first = [], [], [], 0
    for count, start, table in zip(counts, starts, tables, strict=True):
        own = torch.arange(start, start + count)
        blocks = table[: (start + count - 1) // BLOCK_SIZE + 1]
        groups.append(AttentionGroup(first, 1, count, own[None], blocks[None], start + count, needs_mask=True))
        positions.append(own)
        slots.append(blocks[own // BLOCK_SIZE] * BLOCK_SIZE + own % BLOCK_SIZE)
        first += count
    if set(counts) == {1}:  # as decode steps come: one group for all
        width = max(starts) // BLOCK_SIZE + 1
        groups = [
            AttentionGroup(
                0, rows, 1, torch.cat(positions)[:, None], tables[:, :width].contiguous(), max(starts) + 1, True
            )
        ]
    is_scaling = (torch.arange(rows) < scaling_rows).long()
    at = torch.cat(slots)
    new = torch.where(is_scaling == 1, at, cache.scratch_slot)
    read = torch.where(is_scaling == 1, cache.dummy_slot, at)
    ids = torch.randint(300, (rows,), generator=generator)
    wanted = torch.randperm(rows, generator=generator)[: max(1, rows // 2)]
    lines = torch.stack([ids, torch.cat(positions), at, read, new, is_scaling])
    batch = Batch(lines, scaling_rows, wanted, groups)
    if steered:
        experts = cache.gate_rows.shape[2]
        batch.parameters = GateParameters(
            torch.rand(rows, generator=generator) * is_scaling.roll(1),
            torch.randint(experts + 1, (rows,), generator=generator),
            torch.nn.functional.one_hot(torch.randint(experts, (rows,), generator=generator), experts) > 0,
            torch.rand(rows, generator=generator) + 0.5,
        )
        given = torch.rand(1, *cache.gate_rows.shape[1:], generator=generator)
        batch.given = GivenGateRows(batch.gate_slots[-1:], given)
    return step.forward(batch, cache), cache


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize(("scaling", "real"), BATCHES.values(), ids=BATCHES)
def test_one_forward(
    model: XLoraModel, native: NativeStep, threads: int, scaling: list[int], real: list[int], steered: bool
) -> None:
    expected, expected_cache = forward(model, model, scaling, real, steered=steered)
    ours, cache = forward(native, model, scaling, real, steered=steered)
    scale = float(expected.logits.abs().max())
    torch.testing.assert_close(ours.logits / scale, expected.logits / scale, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.gate_logits, expected.gate_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.scalings, expected.scalings, atol=1e-4, rtol=0)
    for own, others in zip(
        (*cache.keys, *cache.values, cache.gate_rows),
        (*expected_cache.keys, *expected_cache.values, expected_cache.gate_rows),
        strict=True,
    ):
        torch.testing.assert_close(own, others, atol=1e-4, rtol=1e-4)


def test_what_no_row_may_see_is_not_looked_at(model: XLoraModel, native: NativeStep) -> None:
    """Slots behind a segment hold what others left there, NaN as well: in a prompt, in drafts, in single rows."""

    class Poisoned:
        def forward(self, batch: Batch, cache: KVCache) -> ForwardOutput:
            seen = torch.zeros(cache.keys[0].shape[:2], dtype=torch.bool)
            for group in batch.groups:
                for table, own in zip(group.block_table, group.positions, strict=True):
                    at = torch.arange(int(own[-1]) + 1)
                    seen[table[at // BLOCK_SIZE], at % BLOCK_SIZE] = True
            for pool in (*cache.keys, *cache.values):
                pool[~seen] = float("nan")
            return native.forward(batch, cache)

    for scaling, real in BATCHES.values():
        expected, _ = forward(native, model, scaling, real)
        ours, _ = forward(Poisoned(), model, scaling, real)
        assert torch.equal(ours.logits, expected.logits)
        assert torch.equal(ours.gate_logits, expected.gate_logits)


def test_what_does_not_fit_is_an_error(tiny: Tiny) -> None:
    """Memory is not read as what it is not."""
    model = tiny.as_stored().model()
    decoder = Decoder.of(model)
    assert decoder is not None
    step = NativeStep(model, decoder)
    good, offsets = step._tensors, step._gate_offsets

    def refused(tensors: list[Tensor], offsets: list[int]) -> None:
        step._tensors, step._gate_offsets = tensors, offsets
        with pytest.raises(RuntimeError, match="fitting shapes"):
            forward(step, model, [1], [1, 2])

    for number, tensor in enumerate(good):
        place = number % 32  # in its layer: four norms, then four tensors of every linear
        for wrong in (tensor.double(), torch.randn(5, 3), torch.empty(0)):
            may_be_missing = place >= 4 and (place - 4) % 4 in (1, 2)  # a bias, or the experts
            if wrong.numel() or (tensor.numel() and not may_be_missing and place not in (2, 3)):
                is_read = tensor.numel() or wrong.numel()
                if is_read and not (place >= 4 and (place - 4) % 4 == 3 and not good[number - 1].numel()):
                    refused([*good[:number], wrong, *good[number + 1 :]], offsets)
    refused(good[:-1], offsets)
    refused(good, offsets[:-1])
    refused(good, [10_000] * len(offsets))
    step._tensors, step._gate_offsets = good, offsets
    forward(step, model, [1], [1, 2])


# -- engines ------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "two of the experts": {"top_k_lora": 2},
    "experts in the scaling pass, one row for all sites": {"scaling_pass_value": 0.25, "layerwise_scalings": False},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def both(request: pytest.FixtureRequest, tiny: Tiny) -> Engines:
    return Engines(tiny.variant(**request.param) if request.param else tiny.as_stored())


def built(engines: Engines, **options: Any) -> Engine:
    engine = engines.build(**options)
    assert isinstance(engine.runner.step, NativeStep)
    return engine


def assert_same(ours: Run, expected: Run) -> None:
    assert ours.choices.keys() == expected.choices.keys()
    for key, choice in expected.choices.items():
        assert ours[key].tokens == choice.tokens
        assert ours[key].drafts == choice.drafts
        np.testing.assert_allclose(ours[key].full, choice.full, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("lookahead", [True, False])
def test_the_same_without(both: Engines, lookahead: bool, count: int) -> None:
    """Alone and together; greedy and sampled."""
    requests = [replace(greedy(f"g{i}", words(i, 5 + 9 * i), 24), return_scalings="full") for i in range(count)]
    requests += [replace(sampled(f"s{i}", words(9 + i, 4), 12, seed=i), return_scalings="full") for i in range(count)]
    expected = run(both.build(lookahead=lookahead, native_kernels=False), requests)
    assert_same(run(built(both, lookahead=lookahead), requests), expected)


def test_steered_and_copied_drafts_are_the_same(both: Engines) -> None:
    """Several rows of one stream in a step, fixed gates, frozen ones, and cached prompts."""
    repeating = words(3, 6) * 4
    requests = [
        replace(
            greedy(f"r{i}", repeating, 20),
            return_scalings="full",
            steering=steering,
            freeze_after=4 if i == 2 else None,
        )
        for i, steering in enumerate([None, Steering(only=()), None, Steering(temperature=0.5, top_k=1)])
    ]
    engine, plain = built(both), both.build(native_kernels=False)
    for _ in range(2):  # the second time from the prefix cache
        assert_same(run(engine, requests), run(plain, requests))


def test_gate_settings_are_the_same(both: Engines) -> None:
    """Dummy rows and global weights of single requests."""
    assert_same(run_mixed(built(both)), run_mixed(both.build(native_kernels=False)))


def test_equals_peft(tiny: Tiny, both: Engines) -> None:
    oracle = Variant(tiny, both.checkpoint).oracle()
    prompt = words(3, 9)
    ours = run(built(both), [greedy("r", prompt, 24)])["r"].tokens
    logits, _ = oracle.forward(prompt + ours)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ours


def test_a_slot_that_is_not_ours_is_left_alone(both: Engines) -> None:
    """A step that wrote one slot too far would spoil other requests."""
    engine = built(both)
    cache = engine.runner.kv_cache
    run(engine, [greedy("first", words(1, 9), 8)])
    for pool in (*cache.keys, *cache.values):
        pool[-1] = 7.0
    before = [pool.clone() for pool in (*cache.keys, *cache.values)]
    held: set[int] = set()

    def remember(engine: Engine, _: StepOutput) -> None:
        for sequences in engine._sequences.values():
            held.update(block for one in sequences for stream in (one.scaling, one.real) for block in stream.blocks)

    run(engine, [greedy("second", words(2, 9), 8)], each_step=remember)
    others = [block for block in range(cache.num_blocks) if block not in held]
    assert others
    for pool, untouched in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(pool[others], untouched[others])
    assert torch.equal(cache.gate_rows[cache.dummy_slot], engine.runner.model.dummy_row)
