"""Tensor parallelism: this rank's shard of every module and of its experts, and the communication between ranks.

    colwise     W_r [out/N, in]    B's rows likewise, A whole       y_r stays split, or is gathered
    rowwise     W_r [out, in/N]    A's columns likewise, B whole    y = sum over ranks, then the bias
    embedding   W_r [V/N, H]       A's columns likewise, B whole    y = sum over ranks

Experts need no communication of their own: W_r x_r + B((A_r x_r) * g) is linear in x_r, so it is summed as a whole.
The gate is equal on every rank, and so is everything that is not split. transformers reads each rank's shard of the
weights, and divides the other modules of its plan (a mixture's experts). Its wrappers around linear layers cannot hold
adapted modules, so ours replace them. Knows modules and shapes, not processes.
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
    """This rank's shard of one module of the base."""

    path: str  # of the module with the shard's weight, which may be inside of one that communicates
    inputs: slice | None = None  # None: all
    outputs: slice | None = None

    def of(self, stack: ExpertStack) -> ExpertStack:
        """This rank's shard of the module's experts."""
        a = stack.a if self.inputs is None else stack.a[:, self.inputs].contiguous()
        b_t = stack.b_t if self.outputs is None else stack.b_t[:, self.outputs].contiguous()
        return ExpertStack(a, b_t, stack.ranks)


@dataclass(frozen=True)
class Shards:
    """This rank's shards of a model; by default the whole model."""

    skeleton: Any  # the whole model's modules, for names and shapes
    kv_split: int = 1  # the number of ranks that the KV heads are divided among
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, site: str) -> Part:
        """This rank's shard of a module."""
        return self.parts.get(site, Part(site))


def split(causal_lm: Any, skeleton: Any, ranks: Ranks) -> Shards:
    """Replaces the modules of `causal_lm` that transformers has divided by plain local ones with this rank's shards."""
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
    """A linear of which `inner` computes this rank's outputs; the outputs of all ranks are gathered."""

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
        if y.numel():  # no rows where no logits are needed
            dist.all_gather(parts, y)
        return torch.cat([part[..., :size] for part, size in zip(parts, self._sizes, strict=True)], -1)


class SummedLinear(nn.Module):
    """A linear whose `inner` multiplies this rank's inputs; the products are summed over the ranks."""

    def __init__(self, inner: nn.Module, bias: nn.Parameter | None, inputs: slice | None) -> None:
        """`inputs`: this rank's inputs, where x arrives whole."""
        super().__init__()
        self.inner, self.bias = inner, bias
        self._inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in / N], or whole [..., in] -> [..., out]."""
        y: Tensor = self.inner(x if self._inputs is None else x[..., self._inputs].contiguous())
        dist.all_reduce(y)
        return y if self.bias is None else y.add_(self.bias)


class SummedEmbedding(nn.Module):
    """An embedding of which `inner` has the rows of this rank's tokens; the rows are summed over the ranks."""

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
    """The module that replaces `module`, and this rank's shard."""
    bias = None if module.bias is None else _local(module.bias)
    inner = nn.Linear(whole.in_features, whole.out_features, bias=False, device="meta")  # sizes follow below
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
    """The same for an embedding. It keeps its own class, because some classes scale their output."""
    tokens = ranks.chunk(vocabulary)
    module.weight = _shard(module, name)
    module.num_embeddings, module.padding_idx = tokens.stop - tokens.start, None
    vars(module).pop("forward", None)  # removes the wrapper that transformers has set while loading
    return SummedEmbedding(module, tokens), Part(f"{name}.inner", inputs=tokens)


def _shard(module: nn.Module, name: str) -> nn.Parameter:
    """The rows or columns of the weight that transformers has loaded on this rank."""
    weight = module.weight
    if not hasattr(weight, "to_local"):
        raise CheckpointError(f"transformers has not divided {name} as its plan says", hint="use another version of it")
    return _local(weight)


def _local(parameter: Any) -> nn.Parameter:
    tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return nn.Parameter(tensor.detach(), requires_grad=False)
