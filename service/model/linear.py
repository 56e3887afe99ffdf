"""XLoraLinear: an nn.Linear plus the gated experts of its site (DESIGN's real pass, two matrix products)."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.experts import ExpertStack
from service.model.gate import Gate

# Where oneDNN's higher cost per call is paid back. MKL reads a large weight once per row, up to four or so.
_MANY_ROWS = 64
_LARGE_WEIGHT = 1 << 19


class AdaptedModule(nn.Module):
    """A module of the base with the experts of one site. The gate is read, not owned: it belongs to the model, once."""

    gate: Gate

    def __init__(self, gate: Gate, site: int) -> None:
        super().__init__()
        self.__dict__["gate"] = gate  # an ordinary attribute would make it a submodule
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
        on_cpu = base.weight.device.type == "cpu" and base.weight.dtype == torch.float32
        self._may_use_onednn = on_cpu and onednn_is_faster()
        self._always_uses_onednn = self._may_use_onednn and base.weight.numel() >= _LARGE_WEIGHT

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        # Read from their dictionaries: as attributes they are found through nn.Module's slow __getattr__.
        own: dict[str, Any] = self._parameters
        experts: dict[str, Any] = self._buffers
        linear = _onednn_linear if self._uses_onednn(x.shape[-2]) else F.linear
        y = linear(x, own["weight"], own["bias"])
        gate = self.gate
        if gate.active:
            first = gate.first_row
            narrow = linear(x.view(-1, self.in_features)[first:], experts["lora_a"]).mul_(gate.at(self.site))
            y.view(-1, self.out_features)[first:].addmm_(narrow, experts["lora_b_t"])
        return y

    def _uses_onednn(self, rows: int) -> bool:
        # torch.export traces with a number of rows that is no int: what it records must hold for every number.
        return self._always_uses_onednn or (self._may_use_onednn and type(rows) is int and rows >= _MANY_ROWS)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by oneDNN, through the operator that torch's own compiler emits. The weight stays as it is."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


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
        return 1.2 * min(seconds(_onednn_linear) for _ in range(8)) < min(seconds(F.linear) for _ in range(8))
