"""`xlora-serve check --verify`: rounding is exact, anything else is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from service.cli import main
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.native.step import NativeStep
from tests.support.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": None}
    return str(make_bundle(tmp_path_factory.mktemp("verify") / "tiny", xlora=xlora, strength=0.3, head=1.5))


def test_a_sound_model(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", bundle, "--verify", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "16 greedy tokens on cpu, torch.float32" in out
    assert re.search(r"scalings \S+e-0[5-9], logprobs \S+e-0[5-9], other tokens 0: exact", out)


def test_half_precision_is_measured_and_not_judged(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", bundle, "--verify", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "not judged in half precision" in capsys.readouterr().out


def test_a_wrong_computation_is_found(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scalings that depend on how many rows share the forward, as a real bug would make them."""
    right = NativeStep._write_scalings

    def wrong(self: NativeStep, hidden: torch.Tensor, batch: Batch, kv_cache: KVCache) -> tuple[torch.Tensor, ...]:
        return right(self, hidden * (1.1 if batch.num_scaling_rows < 11 else 1.0), batch, kv_cache)

    monkeypatch.setattr(NativeStep, "_write_scalings", wrong)
    assert main(["check", bundle, "--verify", "--device", "cpu"]) == 1
    assert "NOT exact" in capsys.readouterr().out


def test_without_the_flag_nothing_is_loaded(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("service.tools.verify.verify")
    assert main(["check", bundle]) == 0
    assert "parity" not in capsys.readouterr().out


def test_the_demo_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).parents[2] / "model_store/demo"
    assert main(["check", str(demo), "--verify", "--device", "cpu"]) == 0
    assert ": exact" in capsys.readouterr().out
