"""Which decoders the native step computes: those that return what the formula gives, whatever they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from service.model.xlora_model import XLoraModel
from service.native.decoder import Decoder
from tests.support.tiny import CPU, Tiny


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
def test_a_decoder_that_does_anything_else_is_none(tiny: Tiny, defect: Callable[[Any], None]) -> None:
    assert Decoder.of(tiny.as_stored().model()) is not None
    base = copy.deepcopy(tiny.base(torch.float32))
    defect(base)
    assert Decoder.of(XLoraModel(tiny.checkpoint, base, device=CPU, dtype=torch.float32)) is None


def test_half_precision_is_none(tiny: Tiny) -> None:
    """Its norms round in between."""
    assert Decoder.of(tiny.as_stored().model(torch.bfloat16)) is None


def test_weights_that_are_not_dense_are_none(tiny: Tiny) -> None:
    model = tiny.as_stored().model()
    head = model.causal_lm.lm_head
    head.weight = nn.Parameter(head.weight.detach().T.contiguous().T, requires_grad=False)
    assert Decoder.of(model) is None


def test_looking_leaves_no_trace(tiny: Tiny) -> None:
    """The model's attention and gate are as before."""
    model = tiny.as_stored().model()
    attention = model.causal_lm.config._attn_implementation
    Decoder.of(model)
    assert model.causal_lm.config._attn_implementation == attention
    assert not model.gate.active
    assert model.gate.logit_rows is None
