"""Recognises the decoders that the native step can compute: those with Llama's architecture.

    x = embedding of the tokens
    h = x + O attention(rotated Q n, rotated K n, V n)     n = norm(x)     in every layer; Q n and K n may have norms
    x = h + D (silu(G m) * U m)                            m = norm(h)
    logits = head(norm(x))

A decoder is recognised by its results, not by its name: it is run on a few tokens, at positions up to the last of its
context, with the probe's attention and stand-ins for its linears, and its logits must equal the formula's bit by bit.
Any other decoder is refused, and runs in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from service.model.adapted import AdaptedModule
from service.model.loading.context import read_context
from service.model.loading.probe import mixed, probe
from service.model.loading.skeleton import build_skeleton
from service.model.loading.weights import compute_buffers
from service.model.targets import is_plain_linear
from service.model.xlora_model import HiddenStateTap, XLoraModel

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# In the order of csrc/layer.h.
LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
_OPTIONAL = {"q_norm", "k_norm", "act_fn"}
_NO_TENSOR = torch.empty(0)

Linear = AdaptedModule | nn.Linear


@dataclass(frozen=True, slots=True)
class Norm:
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module | None) -> Norm | None:
        """A candidate by its attributes; its results decide whether it computes the formula."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        parameters = {} if module is None else dict(module.named_parameters())
        if eps is None or parameters.keys() != {"weight"}:
            return None
        return cls(parameters["weight"], eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return x * ((x * x).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


@dataclass(frozen=True)
class Layer:
    """The modules of one layer."""

    input_norm: Norm
    inner_norm: Norm  # before the MLP
    query_norm: Norm | None
    key_norm: Norm | None
    linears: Sequence[Linear]  # LAYER_LINEARS
    head_dim: int

    def formula(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, T, H] -> [1, T, H], with the probe's attention."""
        q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = self.linears

        def heads(y: Tensor, norm: Norm | None) -> Tensor:
            y = y.view(1, x.shape[1], -1, self.head_dim)
            return (y if norm is None else norm(y)).transpose(1, 2)

        n = self.input_norm(x)
        query, key = heads(q_proj(n), self.query_norm), heads(k_proj(n), self.key_norm)
        attended = mixed(_rotated(query, cos, sin), _rotated(key, cos, sin), heads(v_proj(n), None))
        h = x + o_proj(attended.reshape(1, x.shape[1], -1))
        m = self.inner_norm(h)
        y: Tensor = h + down_proj(F.silu(gate_proj(m)) * up_proj(m))
        return y

    def tensors(self) -> list[Tensor]:
        """The layer's tensors in the order of operators.layers: norms, then weight, bias, A and B of every linear. An
        empty tensor stands for a missing one.
        """
        norms = self.input_norm, self.inner_norm, self.query_norm, self.key_norm
        tensors: list[Tensor | None] = [None if norm is None else norm.weight for norm in norms]
        for linear in self.linears:
            tensors += [linear.weight, linear.bias]
            tensors += [linear.lora_a, linear.lora_b_t] if isinstance(linear, AdaptedModule) else [None, None]
        return [_NO_TENSOR if tensor is None else tensor for tensor in tensors]


@dataclass(frozen=True)
class Decoder:
    """The modules of a decoder that computes the formula, and how it attends."""

    embed: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    layers: Sequence[Layer]
    norm: Norm
    head: Linear
    scaling: float  # of attention
    windows: Sequence[int]  # of each layer, in tokens; 0: none

    @classmethod
    def of(cls, model: XLoraModel) -> Decoder | None:
        """The decoder of a model on a CPU; None where it computes anything else, or not in float32."""
        decoder = cls.candidate(model.causal_lm) if model.dtype == torch.float32 else None
        if decoder is None:
            return None
        model.gate.clear()
        model.gate.logit_rows = _positions(model.causal_lm)
        try:
            return _probed(model.causal_lm, decoder, batch=None)
        finally:
            model.gate.clear()

    @classmethod
    def of_base(cls, base: Path) -> tuple[Any, Decoder | None]:
        """A base's modules on the meta device, and the decoder that `of` would find, before any weight is read."""
        causal_lm = build_skeleton(base, torch.float32)
        compute_buffers(causal_lm)
        _make_up_vectors(causal_lm)
        decoder = cls.candidate(causal_lm)
        return causal_lm, None if decoder is None else _probed(causal_lm, decoder)

    @classmethod
    def candidate(cls, causal_lm: Any) -> Decoder | None:
        """The candidate decoder, found by module names, with or without weights. `_probed` then verifies what it
        computes, and finds out how it attends.
        """
        prefix = causal_lm.base_model_prefix
        decoder = getattr(causal_lm, prefix)
        inner = decoder.decoder if isinstance(decoder, HiddenStateTap) else decoder
        parts: dict[str, Any] = dict(inner.named_children())
        outer: dict[str, Any] = dict(causal_lm.named_children())
        if parts.keys() != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            return None
        if outer.keys() != {prefix, "lm_head"} or not _is_linear(outer["lm_head"]):
            return None
        layers = [_layer(layer) for layer in parts["layers"].children()]
        found, norm = [layer for layer in layers if layer is not None], Norm.of(parts["norm"])
        if len(found) < len(layers) or norm is None or len({layer.input_norm.eps for layer in found}) != 1:
            return None
        return cls(parts["embed_tokens"], parts["rotary_emb"], found, norm, outer["lm_head"], 1.0, ())

    def formula(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [1, T, V] of ids and positions [1, T], with the probe's attention."""
        x = self.embed(ids)
        cos, sin = self.rotary(x, positions)
        for layer in self.layers:
            x = layer.formula(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @property
    def linears(self) -> list[Linear]:
        """The linears of all layers, then the head."""
        return [*(linear for layer in self.layers for linear in layer.linears), self.head]


class StandIns(TorchFunctionMode):
    """Replaces F.linear by a cheap stand-in, and embeddings on the meta device by made-up values.

    The stand-in gathers features of x, with indices derived from the weight's identity. So equal weights give equal
    results, different weights different ones, at no cost for any size, dtype or device of the weight.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            chosen = torch.arange(weight.shape[0]) * 7919 + id(weight) // 16
            y = x.index_select(-1, chosen % x.shape[-1])
            return y if bias is None else y + bias
        if function is F.embedding and args[1].is_meta:
            return (args[0][..., None] * 31 + torch.arange(args[1].shape[1]) * 17) % 97 / 97 - 0.5
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def _probed(causal_lm: Any, decoder: Decoder, **arguments: Any) -> Decoder | None:
    """Runs the model and the formula with stand-in linears, and compares the logits bit by bit. Returns the decoder
    with its scaling and windows, or None. Linears may be replaced because their type is known; what the other modules
    compute is only visible in values. `arguments` are the forward's own.
    """
    positions = _positions(causal_lm)
    ids = (positions * 7919 + torch.arange(len(positions))) % causal_lm.config.get_text_config().vocab_size
    try:
        with StandIns():
            found = probe(causal_lm, ids, positions, **arguments)
            ours = decoder.formula(ids[None], positions[None])
    except Exception:  # another architecture may raise anything
        return None
    in_order = [call.layer for call in found.calls] == list(range(len(decoder.layers)))
    alike = len({call.scaling for call in found.calls}) == 1 and all(call.softcap is None for call in found.calls)
    if not in_order or not alike or not torch.equal(ours, found.logits):
        return None
    scaling = found.calls[0].scaling
    return replace(
        decoder,
        scaling=decoder.layers[0].head_dim ** -0.5 if scaling is None else scaling,
        windows=[call.window or 0 for call in found.calls],
    )


def _positions(causal_lm: Any) -> Tensor:
    """Positions of the probe's tokens, up to the last of the base's context."""
    last = read_context(causal_lm.config.get_text_config()).max_tokens - 1
    return torch.tensor(sorted({0, last, *(1 << power for power in range(last.bit_length()))}))


def _make_up_vectors(causal_lm: nn.Module) -> None:
    """Replaces norms and biases by random ones, in a base without weights."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(causal_lm.named_parameters()):
        if parameter.ndim == 1:
            module, _, own = name.rpartition(".")
            vector = torch.rand(parameter.shape, generator=generator) + 0.5
            setattr(causal_lm.get_submodule(module), own, nn.Parameter(vector, requires_grad=False))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, heads, T, head_dim] rotated by cos and sin [1, T, head_dim], in pairs half a head apart."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def _layer(layer: nn.Module) -> Layer | None:
    """The layer's modules by Llama's names; None where it has any other module."""
    parts = dict(layer.named_children())
    if parts.keys() != LAYER_PARTS:
        return None
    inner = {**dict(parts["self_attn"].named_children()), **dict(parts["mlp"].named_children())}
    if inner.keys() - {*LAYER_LINEARS} - _OPTIONAL or not inner.keys() >= {*LAYER_LINEARS}:
        return None
    modules = {**parts, **inner}
    linears: list[Any] = [inner[name] for name in LAYER_LINEARS]
    norms = {name: Norm.of(modules[name]) for name in _NORMS if name in modules}
    found = {name: norm for name, norm in norms.items() if norm is not None}
    if len(found) < len(norms) or len({norm.eps for norm in found.values()}) > 1:
        return None
    if not all(_is_linear(linear) and not getattr(linear, "is_head", False) for linear in linears):
        return None
    head_dim = getattr(parts["self_attn"], "head_dim", None)
    if not isinstance(head_dim, int):
        return None
    own = found["input_layernorm"], found["post_attention_layernorm"], found.get("q_norm"), found.get("k_norm")
    return Layer(*own, linears, head_dim)


def _is_linear(module: object) -> bool:
    """Whether it is a linear, adapted or not, with contiguous tensors."""
    if isinstance(module, AdaptedModule):
        is_known = module.base is None
    else:
        is_known = isinstance(module, nn.Linear) and is_plain_linear(module)
    if not is_known or not isinstance(module, nn.Module):
        return False
    tensors = (*module.parameters(), *module.buffers())
    return all(tensor.is_contiguous() for tensor in tensors)
