"""A base in 8 or 4 bit: weight-only, through bitsandbytes. Experts, classifier, embeddings and head stay as they are.

    int8   blocks of 64 weights on a linear scale, 8.5 bits a weight
    int4   NF4 in blocks of 64, scales quantised again, about 4.1 bits a weight

Weights are widened for each product, activations are never quantised: a row's result does not depend on its neighbours,
as it would with LLM.int8's outlier columns.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import SettingsError
from service.model.targets import as_linear, is_plain_linear

Quantization = Literal["int8", "int4"]
BLOCK = 64  # weights that share a scale
BITS = {"int8": 8.5, "int4": 4.13}  # of a weight, with its share of the scales


class QuantisedLinear(nn.Module):
    """y = W x + b with W in 8 or 4 bit."""

    def __init__(self, linear: nn.Linear, kind: Quantization, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._library = load_bitsandbytes()
        self._kind = kind
        weight = linear.weight.detach().to(device)
        functional = self._library.functional
        packed: Tensor
        if kind == "int4":
            packed, self._state = functional.quantize_4bit(
                weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
        else:
            code = functional.create_linear_map(signed=True, total_bits=8).to(device)
            packed, self._state = functional.quantize_blockwise(weight, code=code, blocksize=BLOCK)
        self.register_buffer("packed", packed, persistent=False)
        self.bias = linear.bias
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)

    @property
    def bytes(self) -> int:
        """What the weight takes: its codes and their scales."""
        scales = [self._state.absmax, *([self._state.state2.absmax] if self._kind == "int4" else [])]
        return sum(tensor.nbytes for tensor in (self.get_buffer("packed"), *scales))

    def dequantised(self) -> Tensor:
        """W [out, in] in the dtype that it had."""
        functional = self._library.functional
        widen = functional.dequantize_4bit if self._kind == "int4" else functional.dequantize_blockwise
        weight: Tensor = widen(self.get_buffer("packed"), self._state)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if self._kind == "int4":
            packed = self.get_buffer("packed").t()
            y: Tensor = self._library.matmul_4bit(x, packed, quant_state=self._state, bias=self.bias)
            return y
        return F.linear(x, self.dequantised(), self.bias)


def quantise(causal_lm: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Replaces every plain linear of the decoder but the head that has its weights on `device`, one at a time."""
    head = causal_lm.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(causal_lm.named_modules()):
        is_ready = is_plain_linear(module) and module.weight.device.type == device.type
        if is_ready and module is not head:
            causal_lm.set_submodule(name, QuantisedLinear(as_linear(module), kind, device))
    if device.type == "meta":  # the library has kept a table of its own there, and would use it for real weights
        load_bitsandbytes().functional.name2qmap.pop("dynamic", None)


def load_bitsandbytes() -> Any:
    """The library. Raises SettingsError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise SettingsError(
            "--quantization needs bitsandbytes", hint="pip install 'xlora-service[quantization]'"
        ) from None
