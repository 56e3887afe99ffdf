"""Tensor parallelism: this rank's part of every module of the base and of the experts on it, and the sums between.

    colwise     W_r [out/N, in]    B's rows likewise, A whole       y_r stays split, or is gathered
    rowwise     W_r [out, in/N]    A's columns likewise, B whole    y = sum over ranks, then the bias
    embedding   W_r [V/N, H]       A's columns likewise, B whole    y = sum over ranks

Experts need no communication of their own: all of W_r x_r + B((A_r x_r) * g) is linear in x_r, so it is summed as one.
The gate is the same on every rank, and so is all that is not split. transformers reads each rank's part of the weights,
and does what a plan asks of other modules (a mixture's experts); its wrappers around linear layers would not survive
the experts, so ours take their place. Knows modules and shapes, neither processes nor how they found each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import CheckpointError
from service.model.experts import ExpertStack
from service.model.loading.parallel_plan import COLUMN, GATHERED, LINEAR, ROW, VOCABULARY, Ranks, planned, splits_heads


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank has of one module of the base."""

    path: str  # of the module that holds it: inside the one that communicates, where there is one
    inputs: slice | None = None  # None: all
    outputs: slice | None = None

    def of(self, stack: ExpertStack) -> ExpertStack:
        """This rank's part of the experts on the whole module."""
        a = stack.a if self.inputs is None else stack.a[:, self.inputs].contiguous()
        b_t = stack.b_t if self.outputs is None else stack.b_t[:, self.outputs].contiguous()
        return ExpertStack(a, b_t, stack.ranks)


@dataclass(frozen=True)
class Shards:
    """This rank's share of a model: all of it, unless it says otherwise."""

    skeleton: Any  # the names and shapes of the whole
    kv_split: int = 1  # ranks that divide the KV heads among them
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, site: str) -> Part:
        """What this rank has of a module."""
        return self.parts.get(site, Part(site))


def split(causal_lm: Any, skeleton: Any, ranks: Ranks) -> Shards:
    """Makes plain local modules of what transformers has loaded as this rank's shards of `causal_lm`."""
    shards = Shards(skeleton, ranks.size if splits_heads(skeleton) else 1)
    whole = dict(skeleton.named_modules())
    for name, style in planned(causal_lm).items():
        if name not in whole or style not in LINEAR | VOCABULARY:
            continue
        module = causal_lm.get_submodule(name)
        if style in VOCABULARY:
            placed, part = _embedding(module, name, whole[name].num_embeddings, ranks)
        else:
            placed, part = _linear(module, name, style, whole[name], ranks)
        causal_lm.set_submodule(name, placed)
        shards.parts[name] = part
    return shards


class GatheredLinear(nn.Module):
    """All outputs, of which `inner` computes this rank's."""

    def __init__(self, inner: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.inner = inner
        self._sizes = sizes  # outputs of every rank; the last may have fewer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.inner(x)
        widest = self._sizes[0]
        if y.shape[-1] < widest:
            y = F.pad(y, (0, widest - y.shape[-1]))
        parts = [torch.empty_like(y) for _ in self._sizes]
        if y.numel():  # no rows: no logits are wanted
            dist.all_gather(parts, y)
        return torch.cat([part[..., :size] for part, size in zip(parts, self._sizes, strict=True)], -1)


class SummedLinear(nn.Module):
    """The sum of what `inner` makes of every rank's inputs, and a bias. Inputs that arrive whole are cut here."""

    def __init__(self, inner: nn.Module, bias: nn.Parameter | None, cut: slice | None) -> None:
        super().__init__()
        self.inner, self.bias = inner, bias
        self._cut = cut

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in / N], or [..., in] to be cut -> [..., out]."""
        y: Tensor = self.inner(x if self._cut is None else x[..., self._cut].contiguous())
        dist.all_reduce(y)
        return y if self.bias is None else y.add_(self.bias)


class SummedEmbedding(nn.Module):
    """Rows of a table of which `inner` has those of this rank's tokens."""

    def __init__(self, inner: nn.Module, tokens: slice) -> None:
        super().__init__()
        self.inner = inner
        self._first, self._count = tokens.start, tokens.stop - tokens.start

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, T] -> [1, T, H]."""
        own = ids - self._first
        others = (own < 0) | (own >= self._count)
        y: Tensor = self.inner(own.masked_fill_(others, 0))
        dist.all_reduce(y.masked_fill_(others[..., None], 0))
        return y


def _linear(module: Any, name: str, style: str, whole: nn.Linear, ranks: Ranks) -> tuple[nn.Module, Part]:
    """The module that takes the place of `module`, and this rank's part of it."""
    bias = None if module.bias is None else _local(module.bias)
    inner = nn.Linear(whole.in_features, whole.out_features, bias=False, device="meta")  # the sizes are not looked at
    inner.weight = _shard(module, name)
    inner.out_features, inner.in_features = inner.weight.shape
    if style in COLUMN:
        inner.register_parameter("bias", bias)
        return inner, Part(name, outputs=ranks.chunk(whole.out_features))
    path = f"{name}.inner"
    if style in GATHERED:
        inner.register_parameter("bias", bias)
        parts = [Ranks(rank, ranks.size).chunk(whole.out_features) for rank in range(ranks.size)]
        sizes = [part.stop - part.start for part in parts]
        return GatheredLinear(inner, sizes), Part(path, outputs=parts[ranks.rank])
    inputs = ranks.chunk(whole.in_features)
    return SummedLinear(inner, bias, None if style in ROW else inputs), Part(path, inputs=inputs)


def _embedding(module: Any, name: str, vocabulary: int, ranks: Ranks) -> tuple[nn.Module, Part]:
    """The same for an embedding, which stays of its own class: some scale what they look up."""
    tokens = ranks.chunk(vocabulary)
    module.weight = _shard(module, name)
    module.num_embeddings, module.padding_idx = tokens.stop - tokens.start, None
    vars(module).pop("forward", None)  # transformers' wrapper, put there when it was loaded
    return SummedEmbedding(module, tokens), Part(f"{name}.inner", inputs=tokens)


def _shard(module: nn.Module, name: str) -> nn.Parameter:
    """The rows or columns of the weight that transformers has loaded here."""
    weight = module.weight
    if not hasattr(weight, "to_local"):
        raise CheckpointError(f"transformers has not divided {name} as its plan says", hint="use another version of it")
    return _local(weight)


def _local(parameter: Any) -> nn.Parameter:
    tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return nn.Parameter(tensor.detach(), requires_grad=False)
