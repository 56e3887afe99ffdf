"""The draft layer: drafts several tokens ahead of the scaling pass, one after another (DESIGN section 3.1).

    s_1 = h_q                          last hidden state of a scaling row at position q; its own draft is d_1
    y   = W [s_i ; e(d_i)] + c_i       e: the base's embedding of the token just drafted, at position q + i
    z   = y + O attention(RoPE(Q n(y)), keys, values)      n: RMS norm; its weight is folded into Q
    s_{i+1} = z + D silu(U z + b)      d_{i+1}, for position q + i + 1, is drafted from head(s_{i+1})

It attends to the scaling stream's cached keys and values of the base's last layer, positions 0 .. q. Attention lets it
copy from the prompt, as answers often do, and reading the base's cache, it needs none of its own.
A draft only decides whether work done early is kept: in float32 no token and no scaling depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.checkpoint import DraftLayerWeights
from service.model.batch import DraftStart
from service.model.loading.family import kv_shape

EPS = 1e-6  # of the norm

Attend = Callable[[Tensor], Tensor]  # query [n, heads, head_dim] -> attention's output, the same shape
Choose = Callable[[Tensor, int], Tensor]  # logits [n, V] and the depth of their drafts, 2, 3, ... -> int64 [n]


@dataclass(frozen=True, slots=True)
class PureChoice:
    """A choice of drafts that depends on logits, depth and tensors alone, so that a CUDA graph can contain it.

    `inputs` are empty for greedy ones; else temperatures, fp32 [n] (0: greedy), and noise keys, int64 [n, depth - 1].
    """

    function: Callable[[Tensor, int, tuple[Tensor, ...]], Tensor]  # the same object for all choices of a kind
    inputs: tuple[Tensor, ...]

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        """logits [n, V] and the depth of their drafts -> int64 [n]."""
        return self.function(logits, depth, self.inputs)


def take_largest(logits: Tensor, _depth: int, _inputs: tuple[Tensor, ...]) -> Tensor:
    """The greedy PureChoice."""
    return logits.argmax(-1)


class DraftLayer(nn.Module):
    """The layer's tensors, in the base's dtype and on its device."""

    mix: Tensor
    depths: Tensor
    query: Tensor
    output: Tensor
    up: Tensor
    bias: Tensor
    down: Tensor

    def __init__(self, weights: DraftLayerWeights, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.agreement = weights.agreement.tolist()  # acceptance rate at each depth, if earlier drafts were right
        for name, tensor in weights.tensors().items():
            setattr(self, name, nn.Parameter(tensor.to(device, dtype), requires_grad=False))

    def forward(
        self,
        state: Tensor,  # [n, H]: s_i
        embedded: Tensor,  # [n, H]: e(d_i)
        depth: int,  # i, from 1 on
        rotation: tuple[Tensor, Tensor] | None,  # cos and sin [n, rotated] at the positions q + i
        attend: Attend,
    ) -> Tensor:
        """s_{i+1} [n, H], for the base's head."""
        y = F.linear(torch.cat([state, embedded], -1), self.mix) + self.depths[depth - 1]
        query = F.linear(F.rms_norm(y, y.shape[-1:], eps=EPS), self.query).view(len(y), -1, self.head_dim)
        if rotation is not None:
            query = rotated(query, *rotation)
        z = y + F.linear(attend(query).flatten(1), self.output)
        return z + F.linear(F.silu(F.linear(z, self.up, self.bias)), self.down)


def draft_tokens(
    start: DraftStart,
    choose: Choose,
    next_state: Callable[[Tensor, Tensor, int], Tensor],
    head: Callable[[Tensor], Tensor],
) -> Tensor:
    """The drafts after `start`, int64 [n, depth - 1]. `next_state` computes s_{i+1} from s_i, d_i and i."""
    state, tokens = start.state, start.tokens
    drafted = []
    for depth in range(1, start.depth):
        state = next_state(state, tokens, depth)
        tokens = choose(head(state), depth + 1)
        drafted.append(tokens)
    return torch.stack(drafted, 1)


def rotated(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """query [n, heads, head_dim] with its first dimensions rotated by cos and sin [n, rotated]."""
    width = cos.shape[-1]
    turning, rest = query[..., :width], query[..., width:]
    low, high = turning.chunk(2, -1)
    turned = turning * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    return turned if not rest.shape[-1] else torch.cat([turned, rest], -1)


class Rotation:
    """cos and sin of the RoPE of the base's last layer, for the draft layer's queries."""

    def __init__(self, rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._rotary = rotary

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [n] -> cos and sin [n, rotated], fp32."""
        like = torch.empty(0, device=positions.device)
        cos, sin = self._rotary(like, positions[None])
        return cos[0], sin[0]

    @classmethod
    @torch.no_grad()
    def of(cls, causal_lm: Any, head_dim: int) -> Rotation | None:
        """The rotation of the causal LM's last layer, found by calling its module for two positions. None where the
        base has no RoPE, or its module another signature; a draft layer is trained with the same result.
        """
        rotary = next((module for name, module in causal_lm.named_modules() if name.endswith("rotary_emb")), None)
        if rotary is None:
            return None
        kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None)
        positions = torch.arange(2, device=causal_lm.device)
        for extra in ([kinds[-1]], []) if kinds else ([],):
            try:
                rotation = cls(lambda like, at, extra=extra: rotary(like, at, *extra))  # type: ignore[misc]
                cos, sin = rotation(positions)
            except Exception:  # a family whose module has other arguments
                continue
            if cos.shape == sin.shape == (2, cos.shape[-1]) and cos.shape[-1] <= head_dim and not cos.shape[-1] % 2:
                return rotation
        return None


class DraftChain:
    """The draft layer with the base's embeddings and rotation, which it needs."""

    def __init__(self, layer: DraftLayer, embedding: Tensor, rotation: Rotation | None, dtype: torch.dtype) -> None:
        self.layer = layer
        self.embedding = embedding  # [V, H]
        self._rotation, self._dtype = rotation, dtype

    @classmethod
    def of(cls, weights: DraftLayerWeights, causal_lm: Any, *, device: torch.device, dtype: torch.dtype) -> DraftChain:
        """The draft chain of a causal LM whose modules have no experts yet."""
        head_dim = kv_shape(causal_lm.config.get_text_config())[1]
        layer = DraftLayer(weights, head_dim, device=device, dtype=dtype)
        return cls(layer, causal_lm.get_input_embeddings().weight, Rotation.of(causal_lm, head_dim), dtype)

    def embedded(self, tokens: Tensor) -> Tensor:
        """The base's embeddings [n, H] of tokens [n], without experts and without a family's embedding scale."""
        return F.embedding(tokens, self.embedding).to(self._dtype)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [n, rotated] at positions [n]; None without a known RoPE."""
        if self._rotation is None:
            return None
        cos, sin = self._rotation(positions)
        return cos.to(self._dtype), sin.to(self._dtype)
