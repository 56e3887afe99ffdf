"""Which rotations are replaced by the kernel's, and when: those that compute the same, in steps that have it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.model import decode_kernels
from service.model.gate import Gate, Kernels
from service.model.rotation import replace_rotations, rotated

GATE = Gate([], layerwise=True, dtype=torch.float32, device=torch.device("cpu"))


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As Phi-3 has it: what cos does not reach stays."""
    assert unsqueeze_dim == 1
    size = cos.shape[-1]
    return tuple(torch.cat([rotated(x[..., :size], cos, sin), x[..., size:]], -1) for x in (q, k))  # type: ignore[return-value]


class Attention(nn.Module):
    """Calls it as transformers' decoders do."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, dim: int | None = None) -> tuple[Tensor, Tensor]:
        if dim is not None:
            return apply_rotary_pos_emb(x, 2 * x, cos, sin, unsqueeze_dim=dim)
        return apply_rotary_pos_emb(x, 2 * x, cos, sin)


class Other(nn.Module):
    """Has the name among its attributes only."""

    def forward(self, x: Tensor) -> Any:
        return self.apply_rotary_pos_emb(x)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a kernel, in a step that has it: how wide each was."""
    widths: list[int] = []

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        widths.append(x.shape[-1])
        return rotated(x, cos, sin)

    monkeypatch.setattr(GATE, "kernels", Kernels(rotate=rotate))
    return widths


def test_the_kernel_rotates_what_it_can(calls: list[int]) -> None:
    module = Attention()
    replace_rotations(nn.Sequential(module, Other()), torch.float32, GATE)
    x = torch.randn(1, 2, 3, 8)
    whole, part, wide = (torch.randn(2, 1, 3, size) for size in (8, 4, 8))
    for (cos, sin), dim, expected in (
        (whole, None, [8, 8]),
        (part, None, []),  # narrower than a head
        (wide.double(), None, []),  # of another dtype
        (whole, 1, []),  # an argument that the kernel does not know
    ):
        calls.clear()
        torch.testing.assert_close(module(x, cos, sin, dim=dim), Attention()(x, cos, sin, dim=dim), atol=0, rtol=0)
        assert calls == expected
    GATE.kernels = Kernels()
    module(x, *whole)
    assert calls == []


@pytest.mark.parametrize("dtype", decode_kernels.DTYPES, ids=str)
def test_others_are_left(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs side by side, or a scale: not what the kernel computes. And one that cannot be called so."""
    ours = apply_rotary_pos_emb

    def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ours(q, k, cos, sin)
        return q, 1.01 * k

    for other in (
        scaled,
        lambda q, k, cos, sin: ours(q, k, cos.flip(-1), sin),
        lambda x, cos, sin: rotated(x, cos, sin),
    ):
        module = Attention()
        monkeypatch.setitem(globals(), "apply_rotary_pos_emb", other)
        replace_rotations(module, dtype, GATE)
        assert "forward" not in vars(module)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")
@pytest.mark.parametrize("dtype", decode_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 10, 32])
def test_the_kernel(native_kernels: None, head_dim: int, dtype: torch.dtype) -> None:
    """Products are rounded where torch rounds them; fused multiplication may save a rounding in float."""
    x = torch.randn(1, 4, 3, head_dim + 2, dtype=dtype)[..., 1:-1].transpose(1, 2)
    cos, sin = torch.randn(2, 1, 4, head_dim, dtype=dtype)
    ours = decode_kernels.rotate(x, cos, sin)
    torch.testing.assert_close(ours, rotated(x, cos, sin), atol=1e-6 if dtype == torch.float32 else 0, rtol=0)
    assert ours.transpose(1, 2).is_contiguous()
