"""Mean, shares and entropy of gate rows against a recomputation in plain Python numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from service.model.gate_stats import PendingSummary, _summary
from service.model.transfer import HostCopies
from tests.support.recompute import position_summary


def rows(sites: int, experts: int) -> torch.Tensor:
    """[n, S, E]: softmax rows, raw rows with negative numbers, sparse rows, sites that are all zero, rows that are."""
    generator = torch.Generator().manual_seed(sites * 10 + experts)
    raw = torch.randn(12, sites, experts, generator=generator)
    sparse = raw * (torch.rand(raw.shape, generator=generator) < 0.4)
    half = raw.clone()
    half[:, ::2] = 0
    return torch.cat([raw.softmax(-1), raw, sparse, half, torch.zeros(2, sites, experts)])


@pytest.mark.parametrize("sites", [1, 2, 7])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_summary(sites: int, experts: int) -> None:
    """Entropy of p = |g| / sum |g|, mean over the sites that act; NaN only where none does; 0 for one expert."""
    scalings = rows(sites, experts)
    summary = PendingSummary(scalings, HostCopies(torch.device("cpu"))).read()
    for row, mean, share, entropy in zip(scalings.numpy(), summary.mean, summary.share, summary.entropy, strict=True):
        expected_mean, expected_share, expected_entropy = position_summary(row)
        np.testing.assert_allclose(mean, expected_mean, atol=1e-6)
        np.testing.assert_allclose(share, expected_share, atol=1e-6)
        np.testing.assert_allclose(entropy, expected_entropy, atol=1e-6)
    assert np.isnan(summary.entropy[-2:]).all()
    if experts == 1:
        assert (summary.entropy[:12] == 0).all()


def test_a_gpus_summary_is_a_cpus() -> None:
    """Tensors and arrays, by the same formulas."""
    scalings = rows(7, 5)
    mean, share, entropy = _summary(scalings.permute(2, 0, 1).contiguous(), torch.log)
    summary = PendingSummary(scalings, HostCopies(torch.device("cpu"))).read()
    np.testing.assert_allclose(mean.T, summary.mean, atol=1e-6)
    np.testing.assert_allclose(share.T, summary.share, atol=1e-6)
    np.testing.assert_allclose(entropy, summary.entropy, atol=1e-6)


def test_bounds() -> None:
    """A uniform row has ln E, a one-hot row 0, whatever the sign and the size."""
    uniform, one_hot = torch.full((1, 3, 5), -0.1), torch.zeros(1, 3, 5)
    one_hot[..., 2] = 1e-30
    entropy = PendingSummary(torch.cat([uniform, one_hot]), HostCopies(torch.device("cpu"))).read().entropy
    assert entropy[0] == pytest.approx(math.log(5), abs=1e-6)
    assert entropy[1] == 0


def test_summary_of_nothing() -> None:
    """No rows: empty arrays, not an error."""
    summary = PendingSummary(torch.empty(0, 3, 4), HostCopies(torch.device("cpu"))).read()
    assert summary.mean.shape == (0, 4)
    assert summary.entropy.shape == (0,)
