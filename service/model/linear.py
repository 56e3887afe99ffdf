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

_MANY_ROWS = 64  # from here on oneDNN's higher cost per call is paid back


class XLoraLinear(nn.Module):
    """y = W x + b, and for the rows the gate is open for: + B_cat((A_cat x) * g). Inference only."""

    def __init__(self, base: nn.Linear, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.register_buffer("lora_a", stack.a, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)
        self.gate: Gate
        self.__dict__["gate"] = gate  # not a submodule: it belongs to the model, once
        self.site = site
        own = base.weight
        self._prefers_onednn = own.device.type == "cpu" and own.dtype == torch.float32 and onednn_is_faster()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        # Read from their dictionaries: as attributes they are found through nn.Module's slow __getattr__.
        own: dict[str, Any] = self._parameters
        experts: dict[str, Any] = self._buffers
        rows = x.shape[-2]
        # Where torch.export traces, the number of rows is no int, and the choice is not ours.
        linear = _onednn_linear if self._prefers_onednn and type(rows) is int and rows >= _MANY_ROWS else F.linear
        y = linear(x, own["weight"], own["bias"])
        gate = self.gate
        if gate.active:
            first = gate.first_row
            narrow = linear(x.view(-1, self.in_features)[first:], experts["lora_a"]).mul_(gate.at(self.site))
            y.view(-1, self.out_features)[first:].addmm_(narrow, experts["lora_b_t"])
        return y


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
