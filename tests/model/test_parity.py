"""Our model against PEFT's XLoraModel built in memory, fp32: the product of configurations, one 24-token forward each.

`make test` has those points in which every three values of three fields meet, `make test-slow` has all. Longer runs
through the engine are in tests/engine/test_greedy_parity.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.checkpoint import Checkpoint, ClassifierWeights
from service.model.batch import AttentionGroup, Batch
from service.model.xlora_model import XLoraModel
from tests.support.covering import covering
from tests.support.tiny import OneRequest, Tiny, Variant, assert_same, run_once, top_k_gap

TOKENS = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(5)).tolist()
MODES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "raw": {"enable_softmax": False},
    "top2": {"enable_softmax": False, "top_k_lora": 2},
    "softmax-top2": {"top_k_lora": 2},
    "top2-softmax": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
}
FIELDS: list[list[Any]] = [[True, False], [1, 2, 4], list(MODES), [1.0, 0.7], [0.0, 0.25, None], [1.0, 1.7]]
OF_THREE = {tuple(values[i] for values, i in zip(FIELDS, point, strict=True)) for point in covering(FIELDS, 3)}
PRODUCT = [
    pytest.param(*point, marks=() if point in OF_THREE else pytest.mark.slow) for point in itertools.product(*FIELDS)
]


def configuration(
    layerwise: bool, depth: int, mode: str, temperature: float, value: float | None, weight: float
) -> dict[str, Any]:
    """The XLoraConfig fields of one point of the product."""
    return {
        "layerwise_scalings": layerwise,
        "xlora_depth": depth,
        "softmax_temperature": temperature,
        "scaling_pass_value": value,
        "global_scaling_weight": weight,
        **MODES[mode],
    }


def theirs(variant: Variant, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The oracle's logits and scalings; the test is void, not failed, where top-k sits on a tie:
    choose other seeds then.
    """
    oracle = variant.oracle()
    expected = oracle.forward(tokens)
    config = variant.checkpoint.xlora
    if config.top_k_lora is not None:
        before = oracle.xlora.internal_xlora_scalings
        before = before.log() if config.enable_softmax else before  # the scale on which rounding errors are absolute
        assert top_k_gap(before, config.top_k_lora) > 1e-5, "these seeds put top-k on a near-tie; choose others"
    return expected


@pytest.mark.parametrize(("layerwise", "depth", "mode", "temperature", "value", "weight"), PRODUCT)
def test_equals_peft(
    tiny: Tiny, layerwise: bool, depth: int, mode: str, temperature: float, value: float | None, weight: float
) -> None:
    """A field read wrongly, or only right in combination with another one's default;
    in one pass and in mixed chunks.
    """
    variant = tiny.variant(**configuration(layerwise, depth, mode, temperature, value, weight))
    expected = theirs(variant, TOKENS)
    model = variant.model()
    assert_same(run_once(model, TOKENS), expected)
    assert_same(run_once(model, TOKENS, [11, 1, 12]), expected)


def test_the_product_is_not_degenerate(tiny: Tiny) -> None:
    """Every field must matter in the tiny bundle, or a model that ignores it would pass the product above."""
    plain = configuration(True, 2, "softmax-top2", 1.0, 0.25, 1.0)
    reference, _ = theirs(tiny.variant(**plain), TOKENS)
    changes: dict[str, Any] = {
        "layerwise_scalings": False, "xlora_depth": 4, "softmax_temperature": 0.7, "scaling_pass_value": None,
        "global_scaling_weight": 1.7, "top_k_lora": None, "enable_softmax": False, "enable_softmax_topk": True,
    }  # fmt: skip
    for name, value in changes.items():
        changed, _ = theirs(tiny.variant(**{**plain, name: value}), TOKENS)
        assert (changed - reference).abs().max() > 1e-2, name


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [23, 1], [1, 23], [4, 4, 8, 8], [5, 7, 12]], ids=str)
def test_chunks_do_not_matter(tiny: Tiny, chunks: list[int]) -> None:
    """Rows of both streams in one batch: a gate applied to the wrong rows, or keys of a chunk that a later one
    misses.
    """
    for value in (0.0, 0.25):  # with 0 the scaling rows skip the experts altogether
        variant = tiny.variant(**configuration(True, 2, "softmax", 1.0, value, 1.0))
        assert_same(run_once(variant.model(), TOKENS, chunks), theirs(variant, TOKENS))


# -- other bases ---------------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"base_config": {"sliding_window": 7}},
    "gemma2": {"base_config": {"sliding_window": 7, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 3.0}},
    "gemma3_text": {
        "base_config": {
            "sliding_window": 7, "query_pre_attn_scalar": 11, "layer_types": ["sliding_attention", "full_attention"],
        }
    },
    "granite": {
        "base_config": {
            "logits_scaling": 2.0, "residual_multiplier": 0.6, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
        }
    },
    "qwen2": {},
    "qwen3": {},
    "phi3": {"experts": ["one", "two"], "targets": {"one": ["qkv_proj"], "two": ["down_proj", "qkv_proj"]}},
    "llama-mqa": {"architecture": "llama", "base_config": {"num_key_value_heads": 1}},
    "llama-mha": {"architecture": "llama", "base_config": {"num_key_value_heads": 4}},
    "llama-wide-heads": {"architecture": "llama", "base_config": {"head_dim": 16}},
    "llama-tied": {"architecture": "llama", "base_config": {"tie_word_embeddings": True}},
    "llama-llama3": {
        "architecture": "llama",
        "base_config": {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16, "rope_theta": 10000.0,
            }
        },
    },
    "llama-yarn": {
        "architecture": "llama",
        "base_config": {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0
            }
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    """What one family has and Llama has not: sliding window, soft caps, logit scales, biases, fused projections,
    GQA, RoPE kinds.
    """
    bundle = {"architecture": family, **FAMILIES[family]}
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.25}
    tiny = Tiny(tmp_path / family, xlora=xlora, head=1.5, **bundle)
    variant = tiny.as_stored()
    expected = theirs(variant, TOKENS)
    model = variant.model()
    assert model.sites == tiny.oracle.sites
    assert_same(run_once(model, TOKENS), expected)
    assert_same(run_once(model, TOKENS, [9, 1, 1, 13]), expected)


def test_many_layers_many_experts(tmp_path: Path) -> None:
    """From 11 on, "10" sorts before "2": neither layers nor experts may be ordered as text.
    Sites come from the model, not the file.
    """
    experts = {f"expert {chr(ord('k') - i)}": {"r": 1 + i % 3} for i in range(11)}
    tiny = Tiny(
        tmp_path / "deep", layers=11, hidden=16, experts=experts, strength=0.2, with_sites=False,
        xlora={"layerwise_scalings": True, "top_k_lora": 5},
    )  # fmt: skip
    assert tiny.checkpoint.sites is None
    model = tiny.as_stored().model()
    assert model.expert_names == list(experts)
    assert model.sites == tiny.oracle.sites
    assert model.sites != sorted(model.sites)
    assert_same(run_once(model, TOKENS), theirs(tiny.as_stored(), TOKENS))


# -- negative controls: break it, and the comparison must fail -------------------------------------------------------

BASELINE = configuration(True, 2, "softmax-top2", 0.7, 0.25, 1.7)


def fails(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Passes only if the comparison that the parity tests use sees the difference."""
    with pytest.raises(AssertionError):
        assert_same(ours, expected)


def _scale(checkpoint: Checkpoint, expert: int, change: Callable[[str, float, int], float]) -> Checkpoint:
    """The checkpoint with change(site, scale, rank) as the scales of one expert."""
    weights = {
        site: replace(lora, scale=change(site, lora.scale, lora.a.shape[0]))
        for site, lora in checkpoint.experts[expert].weights.items()
    }
    experts = list(checkpoint.experts)
    experts[expert] = replace(experts[expert], weights=weights)
    return replace(checkpoint, experts=tuple(experts))


def _classifier(
    checkpoint: Checkpoint, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], layer: int = -1
) -> Checkpoint:
    layers = list(checkpoint.classifier.layers)
    weight, bias = layers[layer]
    assert bias is not None
    layers[layer] = change(weight, bias)
    return replace(checkpoint, classifier=ClassifierWeights(tuple(layers)))


def _config(**fields: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda checkpoint: replace(checkpoint, xlora=replace(checkpoint.xlora, **fields))


def _reversed_sites(checkpoint: Checkpoint) -> Checkpoint:
    assert checkpoint.sites is not None
    return replace(checkpoint, sites=tuple(reversed(checkpoint.sites)))


DEFECTS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "rsLoRA scale taken as alpha / r": lambda c: _scale(c, 1, lambda _, scale, rank: scale / rank**0.5),
    "alpha_pattern ignored": lambda c: _scale(
        c, 2, lambda site, scale, _: scale * 5 / 9 if site.endswith("gate_proj") else scale
    ),
    "alpha / default rank instead of rank_pattern": lambda c: _scale(c, 2, lambda _, scale, rank: scale * rank / 3),
    "LoRA scale dropped": lambda c: _scale(c, 0, lambda *_: 1.0),
    "experts in another order": lambda c: replace(c, experts=c.experts[::-1]),
    "sites in another order": _reversed_sites,
    "bias shifted by one class": lambda c: _classifier(c, lambda weight, bias: (weight, bias.roll(1))),
    "bias of an inner layer dropped": lambda c: _classifier(
        c, lambda weight, bias: (weight, torch.zeros_like(bias)), layer=0
    ),
    "last layer transposed to [E, S]": lambda c: _classifier(
        c, lambda weight, bias: (weight.view(3, -1, weight.shape[1]).transpose(0, 1).reshape_as(weight), bias)
    ),
    "ReLU left out": _config(enable_relu_and_dropout=False),
    "temperature ignored": _config(softmax_temperature=1.0),
    "global weight ignored": _config(global_scaling_weight=1.0),
    "scaling_pass_value ignored": _config(scaling_pass_value=0.0),
    "top-k ignored": _config(top_k_lora=None),
    "top-k off by one": _config(top_k_lora=1),
    "softmax ignored": _config(enable_softmax=False),
    "top-k softmax not asked for": _config(enable_softmax_topk=True),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_negative_control(tiny: Tiny, defect: str) -> None:
    """If a model with this defect passed, the parity tests would prove nothing."""
    variant = tiny.variant(**BASELINE)
    expected = theirs(variant, TOKENS)
    assert_same(run_once(variant.model(), TOKENS), expected)
    fails(run_once(Variant(tiny, DEFECTS[defect](variant.checkpoint)).model(), TOKENS), expected)


class _Broken(OneRequest):
    """OneRequest with a defect in what a batch says."""

    def __init__(self, model: XLoraModel, defect: str) -> None:
        super().__init__(model, len(TOKENS))
        self.cache.gate_rows[:-1] = 1 / 3  # what a stale row would hold: plausible numbers
        self.defect = defect
        if defect == "one KV stream for both passes":
            self.real_blocks = self.scaling_blocks

    def batch(self, tokens: list[int], scaling: tuple[int, int], real: tuple[int, int]) -> Batch:
        batch = super().batch(tokens, scaling, real)
        scaling_rows = batch.num_scaling_rows
        if self.defect == "gate rows one position late":
            batch.gate_slots[scaling_rows:] = batch.gate_slots[scaling_rows:].roll(1)
        if self.defect == "gate rows never stored":
            batch.new_gate_slots[:] = self.cache.scratch_slot
        if self.defect == "positions doubled":
            batch.positions *= 2
        if self.defect == "keys written one slot off":
            batch.kv_slots[:] = batch.kv_slots.roll(1)
        if self.defect == "one real row counted as a scaling row" and 0 < scaling_rows < batch.fields.shape[1]:
            batch.num_scaling_rows += 1
        return batch


@pytest.mark.parametrize(
    "defect",
    [
        "one KV stream for both passes", "gate rows one position late", "gate rows never stored",
        "positions doubled", "keys written one slot off", "one real row counted as a scaling row",
    ],
)  # fmt: skip
def test_negative_control_of_rows(tiny: Tiny, defect: str) -> None:
    """The same for the bookkeeping of rows: streams, slots, stored gate rows."""
    variant = tiny.variant(**BASELINE)
    fails(_Broken(variant.model(), defect).run(TOKENS, [11, 13]), theirs(variant, TOKENS))


@pytest.mark.parametrize("shift", [1, -1])
def test_negative_control_of_the_mask(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """A causal mask that is off by one in either direction."""

    def mask(group: AttentionGroup, window: int | None, dtype: torch.dtype) -> Tensor:
        key, query = torch.arange(group.keys), group.positions[:, None, :, None]
        visible = key <= (query + shift).clamp_min(0)
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))

    variant = tiny.variant(**BASELINE)
    expected, model = theirs(variant, TOKENS), variant.model()
    monkeypatch.setattr(AttentionGroup, "mask", mask)
    fails(run_once(model, TOKENS), expected)


@pytest.mark.parametrize("window", [6, 8, None])
def test_negative_control_of_the_window(tmp_path: Path, window: int | None) -> None:
    """A sliding window of one more or one less, or none."""
    tiny = Tiny(
        tmp_path / "mistral",
        architecture="mistral",
        base_config={"sliding_window": 7},
        xlora={"layerwise_scalings": True},
    )
    expected = theirs(tiny.as_stored(), TOKENS)
    model = tiny.as_stored().model()
    assert_same(run_once(model, TOKENS), expected)
    for name, module in model.causal_lm.named_modules():
        if name.endswith("self_attn"):
            module.sliding_window = window
    model.config.sliding_window = window
    fails(run_once(model, TOKENS), expected)
