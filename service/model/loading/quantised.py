"""Weight-only quantisation of a base to 8 or 4 bit. Experts, classifier, embeddings and head are not quantised.

    on a GPU, by bitsandbytes     int8: blocks of 64 weights on a linear scale, 8.5 bits a weight
                                  int4: NF4 in blocks of 64, scales quantised again, about 4.1 bits
    on a CPU, by torch itself     int8: a scale per output, 8 bits
                                  int4: scale and zero per group of 64 weights, 4.5 bits in bfloat16

Weights are upcast for each product, and activations are never quantised, so a row's result does not depend on the rest
of the batch, as it would with LLM.int8's outlier columns. For few rows, torch's CPU operators read the packed weights
directly, where bitsandbytes upcasts all of them first: 3 instead of 79 ms for a row and a linear of 14,336 x 4,096
(DECISIONS.md).
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
BLOCK = 64  # weights per scale
BITS = {"int8": 8.5, "int4": 5.0}  # upper bounds of the bits per weight, scales included
_OUTPUTS = 64  # the packed layout of int4 needs a multiple of them
_MIN_UPCAST_ROWS = 64  # from this many rows on, int8 weights are upcast once for all rows


class QuantisedLinear(nn.Module):
    """y = W x + b with W in 8 or 4 bit, by bitsandbytes."""

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
        self.bias = _bias_on(linear, device)

    @property
    def bytes(self) -> int:
        """Bytes of the weight: its codes and their scales."""
        scales = [self._state.absmax, *([self._state.state2.absmax] if self._kind == "int4" else [])]
        return sum(tensor.nbytes for tensor in (self.get_buffer("packed"), *scales))

    def dequantised(self) -> Tensor:
        """W [out, in], upcast to its original dtype."""
        functional = self._library.functional
        upcast = functional.dequantize_4bit if self._kind == "int4" else functional.dequantize_blockwise
        weight: Tensor = upcast(self.get_buffer("packed"), self._state)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if self._kind == "int4":
            packed = self.get_buffer("packed").t()
            y: Tensor = self._library.matmul_4bit(x, packed, quant_state=self._state, bias=self.bias)
            return y
        return F.linear(x, self.dequantised(), self.bias)


class PackedLinear(nn.Module):
    """y = W x + b with W in 8 or 4 bit, by torch's CPU operators. W is padded with zeros to the sizes they need."""

    packed: Tensor  # int8 [out, in]; int4: uint8 [out, in / 2], in a multiple of BLOCK
    scales: Tensor  # int8: [out]; int4: scale and zero [in / BLOCK, out, 2]

    def __init__(self, linear: nn.Linear, kind: Quantization) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._kind = kind
        weight = linear.weight.detach()
        packed, scales = _int8(weight) if kind == "int8" else _int4(weight)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = _bias_on(linear, weight.device)

    def dequantised(self) -> Tensor:
        """W [out, in], upcast to its original dtype."""
        if self._kind == "int8":
            return self.packed[:, : self.in_features].to(self.scales.dtype) * self.scales[:, None]
        identity = torch.eye(self.in_features, dtype=self.scales.dtype)
        return self._product(identity).T

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        y = self._product(x.reshape(-1, self.in_features))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _product(self, rows: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        rows = F.pad(rows, (0, -self.in_features % BLOCK)).contiguous()
        if self._kind == "int8" and len(rows) >= _MIN_UPCAST_ROWS:
            return F.linear(rows, self.packed.to(rows.dtype)) * self.scales
        if self._kind == "int8":
            y: Tensor = torch._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, BLOCK, self.scales)[:, : self.out_features]
        return y


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales. Rows are padded because torch's operator reads beyond those that are no multiple of 16."""
    wide = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK))
    scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).to(weight.dtype)
    return (wide / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int4 codes from 0 to 15, and scales and zeros: w = scale * (code - 8) + zero."""
    out, width = -weight.shape[0] % _OUTPUTS, -weight.shape[1] % BLOCK
    padded = F.pad(weight.float(), (0, width, 0, out))
    groups = padded.view(len(padded), -1, BLOCK)
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    if weight.is_meta:
        return torch.empty(groups.shape[0], groups[0].numel() // 2, dtype=torch.uint8, device="meta"), scales
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    return torch._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1), scales


def _bias_on(linear: Any, device: torch.device) -> nn.Parameter | None:
    return None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)


def quantise(causal_lm: nn.Module, kind: Quantization, device: torch.device, *, for_cpu: bool) -> None:
    """Replaces every plain linear of the decoder, except the head, whose weights are on `device`, one at a time. On the
    meta device, `for_cpu` says which kind is planned.
    """
    head = causal_lm.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(causal_lm.named_modules()):
        is_ready = is_plain_linear(module) and module.weight.device.type == device.type
        if is_ready and module is not head:
            linear = as_linear(module)
            causal_lm.set_submodule(
                name, PackedLinear(linear, kind) if for_cpu else QuantisedLinear(linear, kind, device)
            )
    if device.type == "meta" and not for_cpu:
        # bitsandbytes has cached a table on the meta device, and would use it for real weights
        load_bitsandbytes().functional.name2qmap.pop("dynamic", None)


def load_bitsandbytes() -> Any:
    """Imports bitsandbytes. Raises SettingsError if it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise SettingsError(
            "--quantization on a GPU needs bitsandbytes", hint="pip install 'xlora-service[quantization]'"
        ) from None
