"""XLoraLinear: an nn.Linear plus the gated experts of its site (DESIGN's real pass, two matrix products)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.experts import ExpertStack
from service.model.gate import Gate, GateReader

# From how many elements of a weight on oneDNN's higher cost per call is paid back, and then from how many rows on.
# MKL reads a large weight once per row, up to four or so.
_ONEDNN_ROWS = ((1 << 19, 1), (1 << 16, 16), (0, 64))
_NEVER = 1 << 62
WIDENED_AT_ONCE = 1 << 20  # elements: small enough for a cache, and for malloc to keep


class AdaptedModule(GateReader):
    """A module of the base with the experts of one site."""

    def __init__(self, gate: Gate, site: int) -> None:
        super().__init__(gate)
        self.site = site


class XLoraLinear(AdaptedModule):
    """y = W x + b, and for the rows the gate is open for: + B_cat((A_cat x) * g). Inference only."""

    def __init__(self, base: nn.Linear, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__(gate, site)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.register_buffer("lora_a", stack.a, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)
        self.onednn_rows = onednn_rows(base.weight, gate.dtype)
        self.siblings: tuple[Siblings, int] | None = None  # who computes this with others, and its number among them
        self.is_joint = False  # whether its weight is a part of theirs

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        # Read from their dictionaries: as attributes they are found through nn.Module's slow __getattr__.
        own: dict[str, Any] = self._parameters
        experts: dict[str, Any] = self._buffers
        gate = self.gate
        kernel = gate.kernels.linear
        if kernel is not None and not (self.is_joint and gate.kernels.siblings is not None):
            a, b_t = (experts["lora_a"], experts["lora_b_t"]) if gate.active else (None, None)
            scalings = gate.at(self.site) if gate.active else None
            return kernel(x, own["weight"], own["bias"], a, b_t, scalings, gate.first_row)
        if self.siblings is not None:
            siblings, number = self.siblings
            return siblings.output(x, number)
        linear = onednn_linear if gate.least_rows >= self.onednn_rows else F.linear
        y = widening(linear, x, own["weight"], own["bias"])
        if gate.active:
            first, a, b_t = gate.first_row, widened(experts["lora_a"], x), widened(experts["lora_b_t"], x)
            narrow = F.linear(x.view(-1, self.in_features)[first:], a).mul_(gate.at(self.site))
            y.view(-1, self.out_features)[first:].addmm_(narrow, b_t)
        return y

    __call__ = forward  # nobody hooks into it, and nn.Module's own costs as much as a small addition


class PlainLinear(GateReader):
    """y = W x + b of the base where no expert is, with the gate's kernel for steps of few rows."""

    def __init__(self, base: nn.Linear, gate: Gate) -> None:
        super().__init__(gate)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        own: dict[str, Any] = self._parameters
        kernel = self.gate.kernels.linear
        if kernel is not None:
            return kernel(x, own["weight"], own["bias"], None, None, None, 0)
        return widening(F.linear, x, own["weight"], own["bias"])

    __call__ = forward


class Siblings(Protocol):
    """Computes several linears on one input at once (siblings.py)."""

    def output(self, x: Tensor, number: int, /) -> Tensor:
        """x [1, T, in] -> [1, T, out] of one of them."""


def widened(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype of x, a copy where it is kept narrower (narrow.py)."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


def widening(linear: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(x, weight, bias), with a weight that is kept narrower than x widened a block at a time.

    A copy of a whole large weight would be new memory in every call, which costs eight times what the copying does.
    """
    out, depth = weight.shape
    if weight.dtype == x.dtype or weight.numel() <= WIDENED_AT_ONCE:
        return linear(x, widened(weight, x), bias)
    rows = max(1, WIDENED_AT_ONCE // depth)
    block = x.new_empty(rows, depth)
    y = x.new_empty(*x.shape[:-1], out)
    for first in range(0, out, rows):
        some = weight[first : first + rows]
        y[..., first : first + rows] = linear(x, block[: len(some)].copy_(some), None)
    return y if bias is None else y.add_(bias)


def onednn_rows(weight: Tensor, dtype: torch.dtype) -> int:
    """From how many rows on oneDNN is the faster one for this weight, where the arithmetic is in `dtype`."""
    if weight.device.type != "cpu" or dtype != torch.float32 or not onednn_is_faster():
        return _NEVER
    return next(rows for elements, rows in _ONEDNN_ROWS if weight.numel() >= elements)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by oneDNN, through the operator that torch's own compiler emits. The weight stays as it is.

    oneDNN generates code for every shape it meets (0.4 ms and 0.6 MB each, kept), so long prefills are filled up with
    rows of zeros to one of few lengths.
    """
    rows = x.shape[-2]
    idle = -rows % (64 if rows <= 256 else 256) if rows > 64 else 0
    if idle:
        x = F.pad(x, (0, 0, 0, idle))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[..., :rows, :] if idle else y


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN beats F.linear (MKL) on fp32 prefills on this machine: measured, 10 ms, once per process.

    On a Zen 5 core it is 2.2 times as fast, on others slower (DECISIONS.md).
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight = torch.ones(256, 256), torch.ones(256, 256)

    def seconds(linear: Any) -> float:
        started = time.perf_counter()
        linear(x, weight)
        return time.perf_counter() - started

    with torch.inference_mode():
        return 1.2 * min(seconds(onednn_linear) for _ in range(8)) < min(seconds(F.linear) for _ in range(8))
