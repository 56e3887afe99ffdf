"""`xlora-serve check --verify`: rounding is exact, all else is found, and the output says what it compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.checkpoint import Checkpoint, load_checkpoint
from service.cli import main
from service.commands import check
from service.engine.sizing import resolve_device
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.native.step import NativeStep
from service.tools import reference
from service.tools.two_pass import TwoPassModel
from tests.support.bundles import make_bundle
from tests.support.damage import edit_json, set_json

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Setting `save_emb")
PEFT, PLAIN = r"with PEFT \S+'s own XLoraModel\n", "with the plain two-pass computation, because "
XLORA = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": None}
ROOT = Path(__file__).parents[2]


def make(path: Path, **options: Any) -> str:
    return str(make_bundle(path / "tiny", **{"xlora": XLORA, "strength": 0.3, "head": 1.5, **options}))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("verify"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["check", *arguments, "--verify", "--device", "cpu"])
    return code, capsys.readouterr().out


def test_a_sound_model(bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(reference, "TwoPassModel")
    code, out = run(capsys, bundle)
    assert code == 0
    assert re.search(PEFT, out)
    assert "16 greedy tokens on cpu, float32: 16 the same, 0 near ties, 0 others" in out
    assert re.search(r"largest difference of logits \S+e-0[5-9], of scalings \S+e-0[5-9]: exact", out)


def test_half_precision_is_measured_and_not_judged(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, bundle, "--dtype", "bfloat16")
    assert code == 0
    assert re.search(PEFT, out)
    assert "not judged in half precision" in out


def wrong_scalings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalings that depend on how many rows share the forward, as a real bug would make them."""
    right = NativeStep._write_scalings

    def wrong(self: NativeStep, hidden: torch.Tensor, batch: Batch, kv_cache: KVCache) -> tuple[torch.Tensor, ...]:
        return right(self, hidden * (1.1 if batch.num_scaling_rows < 11 else 1.0), batch, kv_cache)

    monkeypatch.setattr(NativeStep, "_write_scalings", wrong)


def wrong_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert is read a hundredth too large, on one module, by our reading alone."""
    right = check.examine

    def wrong(*arguments: Any, **options: Any) -> tuple[Checkpoint | None, Sequence[Any]]:
        checkpoint, problems = right(*arguments, **options)
        assert checkpoint is not None
        site, lora = next(iter(checkpoint.experts[1].weights.items()))
        checkpoint.experts[1].weights[site] = replace(lora, b=lora.b[...] * 1.01)
        return checkpoint, problems

    monkeypatch.setattr(check, "examine", wrong)


@pytest.mark.parametrize("plant", [wrong_scalings, wrong_expert])
def test_a_wrong_computation_is_found(
    plant: Any, bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    code, out = run(capsys, bundle)
    assert code == 1
    assert re.search(PEFT, out)
    assert "NOT exact" in out


def test_rows_in_another_order_than_peft_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint says to which module a row of its classifier belongs; PEFT numbers modules itself."""
    path = make(tmp_path)
    edit_json("bundle.json", lambda data: data["sites"].reverse())(Path(path))
    code, out = run(capsys, path)
    assert (code, ": exact" in out) == (0, True)
    assert re.search(PEFT, out)


LOST: dict[str, tuple[dict[str, Any], str]] = {
    "GPT-2": ({"architecture": "gpt2", "experts": ["a", "b"], "targets": ["c_attn", "wte"]}, "transformer.h.0.attn"),
    "the head": ({"experts": ["a"], "targets": ["lm_head", "q_proj"]}, "lm_head."),
}


@pytest.mark.parametrize("case", LOST)
def test_peft_computes_with_tensors_that_its_loader_does_not_place(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, name = LOST[case]
    monkeypatch.delattr(reference, "TwoPassModel")
    code, out = run(capsys, make(tmp_path, **options))
    assert (code, ": exact" in out) == (0, True)
    given = "'s own XLoraModel, which was given the experts' tensors because its loader finds no place for"
    assert f"{given} 'base_model.model.{name}" in out


CANNOT: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no ReLU": ({"xlora": {**XLORA, "enable_relu_and_dropout": False}}, (), "has ReLU between its layers, and this"),
    "quantised": ({}, ("--quantization", "int8", "--dtype", "float32"), "PEFT has no base in int8 as it is served"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_peft_cannot_do_is_compared_plainly(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, flags, reason = CANNOT[case]
    monkeypatch.delattr(reference, "_by_peft")
    code, out = run(capsys, make(tmp_path, **options), *flags)
    assert (code, ": exact" in out) == (0, True)
    assert PLAIN in out
    assert reason in out


def test_what_peft_raises_is_a_reason(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field that PEFT refuses and that changes nothing here: no stack trace."""
    path = make(tmp_path)
    set_json("experts/alpha/adapter_config.json", layers_pattern=["h"], layers_to_transform=None)(Path(path))
    code, out = run(capsys, path)
    assert (code, ": exact" in out) == (0, True)
    assert re.search(rf"{PLAIN}PEFT \S+ cannot compute it: ValueError: .*layers_pattern", out)


def test_peft_is_left_alone_where_memory_is_short(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = reference._free_bytes(resolve_device("cpu"))
    assert free > 100 << 20
    monkeypatch.setattr(reference, "_free_bytes", lambda _: 100_000)
    code, out = run(capsys, bundle)
    assert code == 0
    assert f"{PLAIN}PEFT would take 0.0 GiB of memory, and 0.0 GiB are free" in out


def test_the_plain_computation_is_peft_s(bundle: str) -> None:
    checkpoint, cpu = load_checkpoint(bundle), torch.device("cpu")
    plain = TwoPassModel(checkpoint, device=cpu, dtype=torch.float32).forward(range(5, 30))
    theirs = reference.compute_expected(checkpoint, range(5, 30), device=cpu, dtype=torch.float32)
    assert theirs.note is None
    torch.testing.assert_close(plain, (theirs.logits, theirs.scalings), atol=1e-4, rtol=0)


def test_without_the_flag_nothing_is_loaded(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("service.tools.verify.verify")
    assert main(["check", bundle]) == 0
    assert "parity" not in capsys.readouterr().out


def test_the_demo_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, str(ROOT / "model_store/demo"))
    assert (code, ": exact" in out) == (0, True)
    assert re.search(PEFT, out)
