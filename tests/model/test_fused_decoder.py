"""Which decoders run one call per layer, and that they compute what their modules compute."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from service.model import decode_kernels, kernel_library
from service.model.batch import AttentionGroup, Batch
from service.model.kv_cache import KVCache
from service.model.norms import RMSNorm
from service.model.xlora_model import ForwardOutput, XLoraModel
from tests.support.tiny import CPU, Tiny

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")

BLOCK_SIZE, WIDTH = 4, 6
TOLERANCE = 2e-5
KINDS: dict[str, dict[str, Any]] = {
    "llama, experts on some linears": {"experts": ["a", "b"], "targets": ["q_proj", "v_proj", "down_proj"]},
    "llama, heads no vector divides, biases": {
        "hidden": 36,
        "base_config": {"num_attention_heads": 6, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    },
    "mistral, a window": {"architecture": "mistral", "base_config": {"sliding_window": 7}},
    "qwen2, some biases": {"architecture": "qwen2"},
    "qwen3, norms of queries and keys": {"architecture": "qwen3"},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.2}
    path = tmp_path_factory.mktemp("fused") / "bundle"
    model = Tiny(path, xlora=xlora, strength=0.3, **request.param).as_stored().model()
    with torch.no_grad():  # transformers makes biases zero and norms one
        for name, parameter in model.causal_lm.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def step(model: XLoraModel, rows: int, scaling_rows: int, *, kernels: bool) -> tuple[ForwardOutput, KVCache]:
    """A decode step of streams of all lengths over the same leftovers, whichever way it is computed."""
    generator = torch.Generator().manual_seed(rows)
    cache = KVCache.allocate(model.kv_layout(BLOCK_SIZE), rows * WIDTH, model.dummy_row)
    for pool in (*cache.keys, *cache.values):
        pool.normal_(generator=generator)
    cache.gate_rows[:-1].uniform_(generator=generator)
    positions = torch.randint(WIDTH * BLOCK_SIZE, (rows,), generator=generator)
    table = torch.randperm(rows * WIDTH, generator=generator).view(rows, WIDTH)
    slots = table.gather(1, positions[:, None] // BLOCK_SIZE)[:, 0] * BLOCK_SIZE + positions % BLOCK_SIZE
    ids = torch.randint(300, (rows,), generator=generator)
    new = torch.where(torch.arange(rows) < scaling_rows, slots, cache.scratch_slot)
    read = torch.where(torch.arange(rows) < scaling_rows, cache.dummy_slot, slots)
    group = AttentionGroup(0, rows, 1, positions[:, None], table, WIDTH * BLOCK_SIZE, needs_mask=True)
    wanted = torch.randperm(rows, generator=generator)[: max(1, rows // 2)]
    lines = torch.stack([ids, positions, slots, read, new, (torch.arange(rows) < scaling_rows).long()])
    batch = Batch(lines, scaling_rows, wanted, [group], kernels=kernels)
    return model.forward(batch, cache), cache


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = Path("~/.cache/xlora-serve").expanduser()
    kernel_library.provide(cache)
    kernel_library.use_threads(request.param)
    yield request.param
    kernel_library.use_threads(1)


@pytest.mark.parametrize(("rows", "scaling_rows"), [(1, 0), (1, 1), (2, 1), (7, 3), (19, 19), (64, 30), (140, 60)])
def test_the_same_as_its_modules(
    model: XLoraModel, threads: int, rows: int, scaling_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    operator = decode_kernels._decode_layer
    monkeypatch.setattr(decode_kernels, "_decode_layer", lambda *args: layers.append(1) or operator(*args))
    expected, expected_cache = step(model, rows, scaling_rows, kernels=False)
    assert not layers
    ours, cache = step(model, rows, scaling_rows, kernels=True)
    assert len(layers) == 2
    scale = float(expected.logits.abs().max())
    torch.testing.assert_close(ours.logits / scale, expected.logits / scale, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.gate_logits, expected.gate_logits, atol=1e-4, rtol=0)
    for own, others in zip(
        (*cache.keys, *cache.values, cache.gate_rows),
        (*expected_cache.keys, *expected_cache.values, expected_cache.gate_rows),
        strict=True,
    ):
        torch.testing.assert_close(own, others, atol=1e-4, rtol=1e-4, equal_nan=True)


# -- what is not of the kind ------------------------------------------------------------------------------------------


def wrap(module: Any, change: Callable[[Any], Any]) -> None:
    theirs = module.forward
    module.forward = MethodType(lambda self, *args, **kwargs: change(theirs(*args, **kwargs)), module)


def scaled_residual(model: Any) -> None:
    wrap(model.model.layers[1].mlp, lambda y: 0.5 * y)


def other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def scaled_embedding(model: Any) -> None:
    theirs = model.model.forward

    def forward(self: Any, input_ids: Tensor, inputs_embeds: None = None, **kwargs: Any) -> Any:
        return theirs(inputs_embeds=2.0 * self.embed_tokens(input_ids), **kwargs)

    model.model.forward = MethodType(forward, model.model)


def capped_logits(model: Any) -> None:
    theirs = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = theirs(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    model.forward = MethodType(forward, model)


def one_layer_without_rope(model: Any) -> None:
    class WithoutRope(LlamaAttention):
        def forward(self, *args: Any, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(*args, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

    model.model.layers[1].self_attn.__class__ = WithoutRope


def a_layer_that_is_not_run(model: Any) -> None:
    model.model.config.num_hidden_layers = 1


def something_at_late_positions(model: Any) -> None:
    """As Ministral 3 scales its queries, beyond the length that it was first trained on."""
    late = model.config.max_position_embeddings // 2

    class Late(LlamaAttention):
        def forward(self, hidden_states: Tensor, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
            scale = torch.where(position_ids >= late, 1.01, 1.0)[..., None]
            return super().forward(hidden_states * scale, *args, position_ids=position_ids, **kwargs)

    model.model.layers[1].self_attn.__class__ = Late


def one_more_norm(model: Any) -> None:
    layer = model.model.layers[0]
    layer.extra_norm = copy.deepcopy(layer.input_layernorm)


def another_eps(model: Any) -> None:
    model.model.layers[0].post_attention_layernorm.variance_epsilon = 1e-3


DEFECTS = [
    scaled_residual,
    other_activation,
    scaled_embedding,
    capped_logits,
    one_layer_without_rope,
    a_layer_that_is_not_run,
    something_at_late_positions,
    one_more_norm,
    another_eps,
]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_decoder_that_does_anything_else_is_left_to_itself(tiny: Tiny, defect: Callable[[Any], None]) -> None:
    assert tiny.as_stored().model()._fused is not None
    base = copy.deepcopy(tiny.base(torch.float32))
    defect(base)
    assert XLoraModel(tiny.checkpoint, base, device=CPU, dtype=torch.float32)._fused is None


def test_half_precision_is_left_to_itself(tiny: Tiny) -> None:
    """Its norms round in between, so they are not ours."""
    model = tiny.as_stored().model(torch.bfloat16)
    assert not any(isinstance(module, RMSNorm) for module in model.causal_lm.modules())
    assert model._fused is None


def test_what_does_not_fit_is_an_error(tiny: Tiny) -> None:
    """Memory is not read as what it is not."""
    model = tiny.as_stored().model()
    assert model._fused is not None
    calls = model._fused._calls
    tensors, offsets, *how = calls[0]

    def refused(tensors: list[Tensor], offsets: list[int], *how: Any) -> None:
        calls[0] = (tensors, offsets, *how)
        with pytest.raises(RuntimeError, match="fitting shapes"):
            step(model, 3, 1, kernels=True)

    for number, tensor in enumerate(tensors):
        for wrong in (tensor.double(), torch.randn(5, 3), torch.empty(0)):
            is_missing_anyway = not tensor.numel() and not wrong.numel()
            may_be_missing = number >= 4 and (number - 4) % 4 in (1, 2) and not wrong.numel()  # a bias, or the experts
            if not is_missing_anyway and not may_be_missing and (tensor.numel() or number in (2, 3)):
                refused([*tensors[:number], wrong, *tensors[number + 1 :]], offsets, *how)
    refused(tensors[:-1], offsets, *how)
    refused(tensors, offsets[:-1], *how)
    refused(tensors, [10_000] * 7, *how)
    calls[0] = (tensors, offsets, *how)
    step(model, 3, 1, kernels=True)
