"""Sampling noise as a pure function of (seed, choice, output position, vocabulary id): a hash, not a generator.

So a fixed seed gives the same text in every batch, on every device, and after a preemption. A *draft* sampled from the
scaling pass's logits gets the same noise as the real token, which makes the two agree (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed_keys(seeds: Sequence[int], choices: Sequence[int], output_positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """A 64-bit key [n] per (seed, choice, output position): each field is mixed before the next is added."""
    key = _mix(np.array(seeds, np.uint64))
    key = _mix(key + np.array(choices, np.uint64))
    return _mix(key + np.array(output_positions, np.uint64)).view(np.int64)


def gumbel_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, fp32 [n, vocabulary], of keys int64 [n]."""
    bits = _splitmix64_finalise_(keys[:, None] + _counters(vocabulary, keys.device))
    uniform = _shift_right(bits, 11).double().add_(0.5).mul_(2.0**-53)  # in (0, 1), never either end
    return uniform.log_().neg_().log_().neg_().float()


@cache  # captured graphs hold its address
def _counters(vocabulary: int, device: torch.device) -> Tensor:
    """The increment of splitmix64 for each vocabulary id, int64 [vocabulary]."""
    return torch.arange(1, vocabulary + 1, device=device) * _signed(_GOLDEN)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014) of each integer; sums and products wrap."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
    return value ^ (value >> np.uint64(31))


def _splitmix64_finalise_(bits: Tensor) -> Tensor:
    """splitmix64's finaliser on an int64 tensor, in place; products wrap as those of unsigned integers do."""
    bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_signed(_FIRST))
    bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_signed(_SECOND))
    return bits.bitwise_xor_(_shift_right(bits, 31))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right: torch shifts int64 arithmetically."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
