"""The decoder with one call per layer, for steps that have a kernel for it: Llama's architecture, and what is like it.

    x = embedding of the tokens
    h = x + O attention(rotated Q n, rotated K n, V n)     n = norm(x)     in every layer; Q n and K n may have norms
    x = h + D (silu(G m) * U m)                            m = norm(h)
    logits = head(norm(x))                                 by way of the draft head in scaling rows

Which decoders compute that shows in what they return, not in their names: one is run on a few tokens, at positions up
to the last it knows, with its own modules and an attention that only writes down how it was called, and compared with
the formula to the bit. A decoder that does anything else is left to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.batch import Batch
from service.model.draft_head import DraftHead
from service.model.gate import Gate
from service.model.kv_cache import KVCache
from service.model.linear import PlainLinear, XLoraLinear
from service.model.narrow import LAYER_LINEARS, layer_modules
from service.model.norms import RMSNorm
from service.model.rotation import rotated

_NO_TENSOR = torch.empty(0)


@dataclass(frozen=True, slots=True)
class _Attention:
    """How a layer calls attention."""

    scaling: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class _Layer:
    """What a layer is made of."""

    input_norm: RMSNorm
    inner_norm: RMSNorm  # before the MLP
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    linears: Sequence[XLoraLinear | PlainLinear]
    head_dim: int

    def formula(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, T, H] -> [1, T, H], with the probe's attention."""
        q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = self.linears

        def heads(y: Tensor, norm: RMSNorm | None) -> Tensor:
            y = y.view(1, x.shape[1], -1, self.head_dim)
            return (y if norm is None else norm(y)).transpose(1, 2)

        n = self.input_norm(x)
        query, key = heads(q_proj(n), self.query_norm), heads(k_proj(n), self.key_norm)
        attended = _probed(rotated(query, cos, sin), rotated(key, cos, sin), heads(v_proj(n), None))
        h = x + o_proj(attended.reshape(1, x.shape[1], -1))
        m = self.inner_norm(h)
        return h + down_proj(F.silu(gate_proj(m)) * up_proj(m))


class FusedDecoder:
    """Runs the modules of a decoder that computes the formula; they stay where they are."""

    def __init__(self, causal_lm: Any, gate: Gate, layers: Sequence[_Layer]) -> None:
        decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        self._embed, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._head = causal_lm.get_output_embeddings()
        self._gate = gate
        self._layers = layers
        self._ways: list[_Attention] = []  # per layer
        self._cos, self._sin = torch.empty(0), torch.empty(0)  # [positions, head_dim], as far as they were needed
        self._calls: list[tuple[Any, ...]] = []  # per layer: its tensors, where its ranks begin, eps, scaling, window

    @classmethod
    def of(cls, causal_lm: Any, gate: Gate) -> FusedDecoder | None:
        """For a float32 decoder of the kind on a CPU, whose norms and linears have been replaced. It wants `bind`
        before it runs.
        """
        layers = _layers(causal_lm)
        if layers is None:
            return None
        fused = cls(causal_lm, gate, layers)
        return fused if fused._agrees(causal_lm) else None

    def bind(self) -> None:
        """Takes the tensors as they are now: nobody replaces them any more."""
        self._calls = [self._call(layer, how) for layer, how in zip(self._layers, self._ways, strict=True)]

    def forward(
        self, batch: Batch, kv_cache: KVCache, logit_rows: Tensor, draft_head: DraftHead | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [L, V] of `logit_rows`, last hidden state [T, H], under the gate as it is set."""
        gate = self._gate
        kernel, drafting = gate.kernels.layer, gate.kernels.drafting
        assert kernel is not None, "no kernel for layers"
        assert drafting is not None, "no kernel for drafts"
        x = self._embed(batch.input_ids[None])
        cos, sin = self._rotation(batch)
        spread, first_row = gate.spread, gate.first_row
        for number, (tensors, offsets, *how) in enumerate(self._calls):
            x = kernel(x, tensors, spread, offsets, first_row, cos, sin, batch, number, kv_cache, *how)
        hidden: Tensor = self._norm(x)[0]
        if draft_head is None:
            return self._head(hidden.index_select(0, logit_rows)), hidden
        return self._head(drafting(hidden, logit_rows, batch.num_scaling_rows, draft_head.tensors)), hidden

    def _rotation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, head_dim] of the rows' positions."""
        keys = max(group.keys for group in batch.groups)
        if keys > len(self._cos):
            positions = torch.arange(1 << (keys - 1).bit_length())
            cos, sin = self._rotary(torch.empty(0), positions[None])
            self._cos, self._sin = cos[0], sin[0]
        return (
            self._cos.index_select(0, batch.positions)[None],
            self._sin.index_select(0, batch.positions)[None],
        )

    @torch.inference_mode()
    def _agrees(self, causal_lm: Any) -> bool:
        """Whether the decoder computes the formula; takes in how its layers attend."""
        config = causal_lm.config.get_text_config()
        last = max(1, config.max_position_embeddings - 1)
        positions = torch.tensor(sorted({0, last, *(1 << power for power in range(last.bit_length()))}))
        ids = (positions * 7919 + torch.arange(len(positions))) % config.vocab_size
        probe = _Probe()
        self._gate.logit_rows = positions
        try:
            theirs = causal_lm(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, batch=probe, kv_cache=None
            ).logits
            x = self._embed(ids[None])
            cos, sin = self._rotary(x, positions[None])
            for layer in self._layers:
                x = layer.formula(x, cos, sin)
            ours = self._head(self._norm(x))
        except Exception:  # whatever it is made of, it is not this
            return False
        finally:
            self._gate.clear()
        self._ways = [how for _, how in probe.calls]
        in_order = [number for number, _ in probe.calls] == list(range(len(self._layers)))
        return in_order and torch.equal(ours, theirs) and all(how.softcap is None for how in self._ways)

    def _call(self, layer: _Layer, how: _Attention) -> tuple[Any, ...]:
        norms = layer.input_norm, layer.inner_norm, layer.query_norm, layer.key_norm
        tensors: list[Tensor | None] = [None if norm is None else norm.weight for norm in norms]
        offsets = []
        for linear in layer.linears:
            experts: dict[str, Tensor] = dict(linear.named_buffers())
            tensors += [linear.get_parameter("weight"), dict(linear.named_parameters()).get("bias")]
            tensors += [experts.get("lora_a"), experts.get("lora_b_t")]
            offsets.append(self._gate.offset(linear.site) if isinstance(linear, XLoraLinear) else 0)
        given = [_NO_TENSOR if tensor is None else tensor for tensor in tensors]
        return given, offsets, layer.input_norm.eps, how.scaling, how.window


class _Probe:
    """A batch whose attention mixes a row's own query, key and value, and writes down how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, _Attention]] = []  # of the layers, in order

    def self_attention(
        self, query: Tensor, key: Tensor, value: Tensor, batch: Any, layer: int, kv_cache: Any, *how: Any
    ) -> Tensor:
        """[1, T, heads, head_dim]"""
        self.calls.append((layer, _Attention(*how)))
        return _probed(query, key, value)


def _probed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    each = query.shape[1] // key.shape[1]
    return (query * key.repeat_interleave(each, 1) + value.repeat_interleave(each, 1)).transpose(1, 2)


def _layers(causal_lm: Any) -> list[_Layer] | None:
    """The decoder's layers, by the usual names; None where anything else is in it."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    children = dict(decoder.named_children())
    if children.keys() != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    if {name for name, _ in causal_lm.named_children()} != {causal_lm.base_model_prefix, "lm_head"}:
        return None
    layers = [_layer(layer) for layer in children["layers"].children()]
    found = [layer for layer in layers if layer is not None]
    return found if len(found) == len(layers) else None


def _layer(layer: nn.Module) -> _Layer | None:
    parts, inner = dict(layer.named_children()), layer_modules(layer)
    if inner.keys() - {*LAYER_LINEARS, "q_norm", "k_norm", "act_fn"} or not inner.keys() >= set(LAYER_LINEARS):
        return None
    norms = parts["input_layernorm"], parts["post_attention_layernorm"], inner.get("q_norm"), inner.get("k_norm")
    linears = [inner[name] for name in LAYER_LINEARS]  # in the order of kernels/operators.cpp
    own = [norm for norm in norms if norm is not None]
    if not all(isinstance(norm, RMSNorm) for norm in own) or len({norm.eps for norm in own}) > 1:
        return None
    if not all(isinstance(linear, XLoraLinear | PlainLinear) for linear in linears):
        return None
    if any(norm.weight.is_meta or norm.weight.dtype != torch.float32 for norm in own):
        return None
    head_dim = getattr(parts["self_attn"], "head_dim", None)
    return _Layer(*norms, linears, head_dim) if isinstance(head_dim, int) else None  # type: ignore[arg-type]
