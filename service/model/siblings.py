"""Adapted linears that read the same input (q, k and v; gate and up), computed together when the first is called.

    y = W x        one product for all, where their weights are small: there a call costs more than what it computes
    n = A x * g    one product
    y += B n       one each

Which linears these are is seen in a run of the decoder on the meta device; no family is known by name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AttentionInterface

from service.model.attention import ATTENTION
from service.model.linear import XLoraLinear, onednn_linear, onednn_rows, widened, widening

_SHAPES = "xlora_shapes"  # an attention that computes nothing
_TOKENS = 2
_SMALL = 1 << 19  # elements of weights; larger ones may be mapped from the checkpoint's files, and stay where they are


class Siblings:
    """Linears on one input at neighbouring sites. They keep their tensors, as views of the ones here."""

    def __init__(self, linears: Sequence[XLoraLinear]) -> None:
        self._linears = linears
        self._gate = linears[0].gate
        self._sites = linears[0].site, linears[-1].site
        self._outs = [linear.out_features for linear in linears]
        self._ranks = [linear.get_buffer("lora_a").shape[0] for linear in linears]
        self._lora_a = torch.cat([linear.get_buffer("lora_a") for linear in linears])  # [sum of ranks, in]
        # A stack that could have been kept narrow (narrow.py) is not, beside one that could not.
        self._lora_b_t = [linear.get_buffer("lora_b_t").to(self._lora_a.dtype) for linear in linears]
        self._weight, self._bias = _joined(linears)
        self._onednn_rows = onednn_rows(linears[0].weight if self._weight is None else self._weight, self._gate.dtype)
        self._input: Tensor | None = None  # what _outputs were computed from
        self._outputs: Sequence[Tensor] = ()
        self._left = 0  # linears that have not come for theirs
        parts = zip(linears, self._lora_a.split_with_sizes(self._ranks), self._lora_b_t, strict=True)
        for number, (linear, a, b_t) in enumerate(parts):
            linear.lora_a, linear.lora_b_t = a, b_t
            linear.siblings = self, number
            linear.is_joint = self._weight is not None

    def output(self, x: Tensor, number: int) -> Tensor:
        """x [1, T, in] -> [1, T, out] of one of them."""
        if x is not self._input:
            self._outputs = self._compute(x)
            self._input, self._left = x, len(self._linears)
        y = self._outputs[number]
        self._left -= 1
        if not self._left:
            self._input, self._outputs = None, ()
        return y

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        gate, outs, kernels = self._gate, self._outs, self._gate.kernels
        if kernels.siblings is not None and kernels.linear is not None and self._weight is not None:
            if gate.active:
                scalings = gate.across(*self._sites)
                y = kernels.siblings(
                    x, self._weight, self._bias, self._lora_a, self._lora_b_t, scalings, gate.first_row
                )
            else:
                y = kernels.linear(x, self._weight, self._bias, None, None, None, 0)
            return y.split_with_sizes(outs, -1)
        linear = onednn_linear if gate.least_rows >= self._onednn_rows else F.linear
        first = gate.first_row
        targets: Sequence[Tensor] = ()
        if self._weight is None:
            outputs: Sequence[Tensor] = [
                widening(linear, x, own.weight, own._parameters["bias"]) for own in self._linears
            ]
            if gate.active:
                targets = [y.view(-1, y.shape[-1])[first:] for y in outputs]
        else:
            y = widening(linear, x, self._weight, self._bias)
            outputs = y.split_with_sizes(outs, -1)
            if gate.active:
                targets = y.view(-1, y.shape[-1])[first:].split_with_sizes(outs, 1)
        if gate.active:
            rows = x.view(-1, x.shape[-1])[first:]
            narrow = (
                F.linear(rows, widened(self._lora_a, x))
                .mul_(gate.across(*self._sites))
                .split_with_sizes(self._ranks, 1)
            )
            for target, part, b_t in zip(targets, narrow, self._lora_b_t, strict=True):
                target.addmm_(part, widened(b_t, x))
        return outputs


def _joined(linears: Sequence[XLoraLinear]) -> tuple[Tensor | None, Tensor | None]:
    """Their weights and biases as one, which each then has a view of; None where they are large, or not alike."""
    biased = sum(linear.bias is not None for linear in linears)
    if sum(linear.weight.numel() for linear in linears) > _SMALL or biased not in (0, len(linears)):
        return None, None
    return _join(linears, "weight"), _join(linears, "bias") if biased else None


def _join(linears: Sequence[XLoraLinear], name: str) -> Tensor:
    whole = torch.cat([linear.get_parameter(name).detach() for linear in linears])
    parts = whole.split_with_sizes([linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        setattr(linear, name, nn.Parameter(part, requires_grad=False))
    return whole


def join_siblings(causal_lm: Any) -> None:
    """Makes Siblings of all XLoraLinears of neighbouring sites that read the same input."""
    linears = [module for module in causal_lm.modules() if isinstance(module, XLoraLinear)]
    linears.sort(key=lambda linear: linear.site)
    inputs = _inputs(causal_lm, linears)
    groups: list[list[XLoraLinear]] = []
    for linear in linears:
        last = groups[-1][-1] if groups else None
        if last is not None and last.site + 1 == linear.site and inputs.get(last, 0) is inputs.get(linear):
            groups[-1].append(linear)
        else:
            groups.append([linear])
    for group in groups:
        if len(group) > 1:
            Siblings(group)


class _Recorder:
    """Stands in for Siblings and writes down what each linear reads."""

    def __init__(self, linears: Sequence[XLoraLinear]) -> None:
        self._linears = linears
        self.inputs: dict[XLoraLinear, Tensor] = {}

    def output(self, x: Tensor, number: int) -> Tensor:
        """x [1, T, in] -> [1, T, out] without values."""
        linear = self._linears[number]
        self.inputs[linear] = x
        return x.new_empty(*x.shape[:-1], linear.out_features)


def _inputs(causal_lm: Any, linears: Sequence[XLoraLinear]) -> dict[XLoraLinear, Tensor]:
    """What each linear reads, on the meta device; nothing where the decoder looks at values, or ranks wait for each
    other in it.
    """
    recorder = _Recorder(linears)
    if len(linears) < 2 or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    for number, linear in enumerate(linears):
        linear.siblings = recorder, number
    causal_lm.set_attn_implementation(_SHAPES)
    tensors = {**dict(causal_lm.named_parameters()), **dict(causal_lm.named_buffers())}
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    try:
        functional_call(
            causal_lm,
            {name: tensor.to("meta") for name, tensor in tensors.items()},
            kwargs={"input_ids": ids, "position_ids": ids, "use_cache": False},
        )
    except (NotImplementedError, RuntimeError):
        return {}
    finally:
        causal_lm.set_attn_implementation(ATTENTION)
        for linear in linears:
            linear.siblings = None
    return recorder.inputs


def _shapes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(_SHAPES, _shapes)
