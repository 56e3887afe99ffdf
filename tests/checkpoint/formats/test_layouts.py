"""Checkpoints that PEFT and the original library wrote load to the scalings and logits of the model they came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.checkpoint import Overrides, find_problems, load_checkpoint
from service.checkpoint.base import BaseModel
from service.checkpoint.defects import Defects
from service.checkpoint.report import describe
from service.checkpoint.weights.lora_names import pair_names
from service.checkpoint.weights.tensors import TensorFile, TensorInfo
from service.cli import main
from service.contract.errors import CheckpointError, SettingsError
from service.model.loading.passes import load_model
from tests.support.damage import edit_json, edit_tensors, poison, remove, set_json
from tests.support.make_fixtures import CASES, EXPERTS, ORIGINAL_CASES, ORIGINAL_NAMES
from tests.support.tiny import run_once

FIXTURES = Path(__file__).parents[1] / "fixtures"
EARLY = FIXTURES / "peft-0.13.2"
SOUND, DAMAGED, ORIGINAL = FIXTURES / "peft-0.19.1", FIXTURES / "peft-0.21.2", FIXTURES / "original"
BASE = Overrides(base=str(FIXTURES / "base"))
FROM_ELSEWHERE = Overrides(str(FIXTURES / "base"), {str(n): str(FIXTURES / f"experts/e{n}") for n in range(EXPERTS)})


def assert_equals_live(folder: Path, expected: Path, **options: Any) -> None:
    """Scalings and logits of the checkpoint in `folder` are those stored in `expected` when it was made."""
    live = load_file(expected / "expected.safetensors")
    model = load_model(load_checkpoint(folder, **options), device=torch.device("cpu"), dtype=torch.float32)
    logits, scalings = run_once(model, live["tokens"].tolist())
    torch.testing.assert_close(scalings, live["scalings"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, live["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_sound_peft_save(case: str) -> None:
    """From the folder alone (PEFT's folders of the experts), and with the experts that it names."""
    assert_equals_live(SOUND / case, SOUND / case, overrides=BASE)
    assert_equals_live(SOUND / case, SOUND / case, allow_outside=True)


def test_early_peft_save() -> None:
    """Tensors of adapter "1" have lost every ".1" of their names, the layer's number with it; so has every other."""
    names = load_file(EARLY / "depth2/1/adapter_model.safetensors")
    assert "base_model.lora_model.model.model.layers.self_attn.q_proj.lora_A.weight" in names
    assert_equals_live(EARLY / "depth2", EARLY / "depth2", overrides=BASE)


@pytest.mark.parametrize("expert", ["0", "1", "2", "11", "12"])
def test_names_of_many_layers_come_back(expert: str) -> None:
    modules = [f"model.layers.{layer}.mlp.{name}" for layer in range(130) for name in ("up_proj", "down_proj")]
    base = BaseModel(Path(), {}, (), dict.fromkeys((f"{module}.weight" for module in modules), (8, 8)))
    sides = [f"base_model.lora_model.model.{module}.lora_{side}.{expert}.weight" for module in modules for side in "AB"]
    tensors = {name.replace(f".{expert}", ""): TensorInfo(name, "F32", (8, 8), 0, 0) for name in sides}
    found, from_xlora = pair_names(TensorFile(Path(), tensors, 0, 0), base, Defects(), expert)
    assert from_xlora
    assert set(found) == set(modules)
    assert all(names.keys() == {"A", "B"} for names in found.values())


@pytest.mark.parametrize("case", ORIGINAL_CASES)
def test_original_library(case: str) -> None:
    """Depth 1, 2 and 4, with and without ReLU and bias, `adapters` as a list and as a map."""
    checkpoint = load_checkpoint(ORIGINAL / case, overrides=BASE)
    assert [expert.name for expert in checkpoint.experts] == ORIGINAL_NAMES[: ORIGINAL_CASES[case][0]]
    assert_equals_live(ORIGINAL / case, ORIGINAL / case, overrides=BASE)


def test_class_order_is_numeric() -> None:
    """The file lists "10" before "2"; class 10 is expert 10."""
    stated = list(json.loads((SOUND / "depth2/adapter_config.json").read_text())["adapters"])
    assert stated.index("10") < stated.index("2")
    checkpoint = load_checkpoint(SOUND / "depth2", overrides=BASE)
    assert [expert.name for expert in checkpoint.experts] == [str(number) for number in range(EXPERTS)]


def test_expected_values_tell_experts_and_layers_apart() -> None:
    """Negative control: with two experts exchanged, the fixture's numbers are not met."""
    exchanged = Overrides(
        BASE.base, {"0": str(FIXTURES / "experts/e3"), "3": str(FIXTURES / "experts/e0")}
    )  # both target q_proj and v_proj
    with pytest.raises(AssertionError):
        assert_equals_live(SOUND / "depth2", SOUND / "depth2", overrides=exchanged)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_drops_is_named(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What happened, in which versions, and the way out; exit code 1."""
    missing = {"depth1": "'layers.0'", "depth2": "'layers.0', 'layers.3'", "depth4": "'layers.0', 'layers.3'"}
    missing["stride2"] = "'layers.0', 'layers.2', 'layers.4', 'layers.6'"
    assert main(["check", str(DAMAGED / case), "--allow-outside"]) == 1
    error = capsys.readouterr().err
    assert f"{case}/adapter_model.safetensors: the classifier is incomplete" in error
    assert f"missing {missing[case]}" in error
    assert "PEFT 0.20 and later drop classifier tensors" in error
    assert "this is from 0.21.2" in error
    assert "xlora-serve convert --rescue" in error
    assert len(error.splitlines()) == 2


def test_without_the_experts_folders_only_the_live_model_helps(tmp_path: Path) -> None:
    folder = shutil.copytree(DAMAGED / "depth1", tmp_path / "x")
    for number in range(3):
        shutil.rmtree(folder / str(number))
    with pytest.raises(CheckpointError, match=r"service\.checkpoint\.export.*PEFT 0\.19\.1"):
        load_checkpoint(folder, overrides=FROM_ELSEWHERE_3)


FROM_ELSEWHERE_3 = Overrides(FROM_ELSEWHERE.base, {str(n): str(FIXTURES / f"experts/e{n}") for n in range(3)})


def test_experts_that_peft_damaged_are_named_with_the_flag() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(DAMAGED / "depth4", overrides=Overrides(BASE.base, rescue=True))
    assert "0/adapter_model.safetensors: missing tensors for 'model.layers.1.self_attn.q_proj'" in str(caught.value)
    assert "--expert 0=PATH" in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_rescue(tmp_path: Path, case: str) -> None:
    """What PEFT 0.21 moved to the experts' folders is put back: the result is the model that was saved."""
    target = tmp_path / "bundle"
    assert main(["convert", str(DAMAGED / case), str(target), "--allow-outside", "--rescue"]) == 0
    assert_equals_live(target, DAMAGED / case)


def test_a_path_that_does_not_resolve_names_the_flag(tmp_path: Path) -> None:
    folder = shutil.copytree(SOUND / "depth1", tmp_path / "x")
    shutil.rmtree(folder / "1")
    with pytest.raises(CheckpointError, match=r"expert '1': .*e1.*--expert 1=PATH"):
        load_checkpoint(folder, overrides=BASE)
    given = Overrides(BASE.base, {"1": str(FIXTURES / "experts/e1")})
    assert_equals_live(folder, SOUND / "depth1", overrides=given)


def test_a_base_that_does_not_resolve_names_the_flag(tmp_path: Path) -> None:
    folder = shutil.copytree(SOUND / "depth1", tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: base: .*--base"):
        load_checkpoint(folder, allow_outside=True)
    set_json("adapter_config.json", base_model_name_or_path=None)(folder)
    with pytest.raises(CheckpointError, match=r"base: the file does not name one .*--base"):
        load_checkpoint(folder)


def test_flags_are_checked() -> None:
    with pytest.raises(CheckpointError, match=r"--expert maths: no such expert .*math, code, bio"):
        load_checkpoint(ORIGINAL / "depth1", overrides=Overrides(BASE.base, {"maths": "x"}))
    with pytest.raises(CheckpointError, match=r"--base: expected a folder or a hub id, found '/nowhere'"):
        load_checkpoint(ORIGINAL / "depth1", overrides=Overrides("/nowhere"))
    for text in ("math", "=x", "math=", "a=1,a=2"):
        with pytest.raises(SettingsError, match="--expert"):
            Overrides.parse(None, text.split(","), None)


def test_trainable_adapters_come_from_the_save(tmp_path: Path) -> None:
    """With use_trainable_adapters, the experts that the file names are older than the classifier."""
    folder = shutil.copytree(SOUND / "depth1", tmp_path / "a/b/x")
    shutil.copytree(FIXTURES / "experts", tmp_path / "a/experts")
    poison("a/experts/e1/adapter_model.safetensors", TENSOR, 7.0)(tmp_path)
    set_json("adapter_config.json", use_trainable_adapters=True)(folder)
    assert_equals_live(folder, SOUND / "depth1", overrides=BASE, allow_outside=True)


TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_unknown_kinds_of_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"peft_type: expected 'XLORA', found 'LORA' .*one adapter has no gate"):
        load_checkpoint(FIXTURES / "experts/e0")
    with pytest.raises(CheckpointError, match="expected an X-LoRA checkpoint, found a plain model"):
        load_checkpoint(FIXTURES / "base")
    with pytest.raises(CheckpointError, match=r"expected a file, found nothing .*adapter_config.json.*xlora_config"):
        load_checkpoint(tmp_path)


ORIGINAL_DAMAGE = {
    "no adapters": (edit_json("xlora_config.json", lambda d: d.pop("adapters")), "adapters: .*found None.*--ordering"),
    "adapters of numbers": (set_json("xlora_config.json", adapters=[1, 2]), "adapters: expected a list of names"),
    "adapter twice": (set_json("xlora_config.json", adapters=["math", "math"]), "adapters: expected a list of names"),
    "unknown field": (set_json("xlora_config.json", top_k=1), "unknown config key 'top_k'"),
    "no classifier": (remove("xlora_classifier.safetensors"), "xlora_classifier.safetensors: expected a file"),
    "NaN": (poison("xlora_classifier.safetensors", "last.weight", float("nan")), "expected finite values, found NaN"),
    "bias unannounced": (set_json("xlora_config.json", use_bias=True), "missing tensor 'last.bias'"),
    "expert missing": (
        set_json("xlora_config.json", adapters=["math", "code", "physics"]),
        "expert 'physics': .*--expert",
    ),
}
PEFT_DAMAGE = {
    "adapters missing": (edit_json("adapter_config.json", lambda d: d.pop("adapters")), "adapters: expected a map"),
    "adapters named": (
        set_json("adapter_config.json", adapters={"a": "x", "b": "y"}),
        "adapters: expected the keys '0' to '1', found a, b .*the class order is lost.*--ordering",
    ),
    "depth": (set_json("adapter_config.json", xlora_depth=3), "xlora_depth 3 expects 3 layers, found 1"),
    "extra layer": (
        edit_tensors(
            "adapter_model.safetensors",
            lambda d: d.update({"base_model.internal_xlora_classifier.layers.3.weight": torch.ones(1)}),
        ),
        "unexpected tensor 'layers.3.weight': xlora_depth 1 expects 1 layers, found 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ORIGINAL_DAMAGE)
def test_damaged_original(tmp_path: Path, case: str) -> None:
    damage, expected = ORIGINAL_DAMAGE[case]
    folder = shutil.copytree(ORIGINAL / "depth1", tmp_path / "x")
    damage(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(folder, overrides=BASE)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value) in map(str, find_problems(folder, overrides=BASE))


@pytest.mark.parametrize("case", PEFT_DAMAGE)
def test_damaged_peft(tmp_path: Path, case: str) -> None:
    damage, expected = PEFT_DAMAGE[case]
    folder = shutil.copytree(SOUND / "depth1", tmp_path / "x")
    damage(folder)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(folder, overrides=BASE)


def test_ordering(tmp_path: Path) -> None:
    """mistral.rs's file gives the class order where it is lost, and the order of the sites."""
    folder = shutil.copytree(ORIGINAL / "depth2", tmp_path / "x")
    edit_json("xlora_config.json", lambda data: data.pop("adapters"))(folder)
    sites = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    ordering = {"order": ORIGINAL_NAMES, "layers": {site: n for n, site in enumerate(sites)}, "base_model_id": "x/y"}
    path = tmp_path / "ordering.json"
    path.write_text(json.dumps(ordering))
    overrides = Overrides(BASE.base, ordering=path)
    assert load_checkpoint(folder, overrides=overrides).sites == tuple(sites)
    assert_equals_live(folder, ORIGINAL / "depth2", overrides=overrides)
    path.write_text(json.dumps(ordering | {"layers": {site: n for n, site in enumerate(reversed(sites))}}))
    assert load_checkpoint(folder, overrides=overrides).sites == tuple(reversed(sites))
    with pytest.raises(AssertionError):  # the rows of the classifier now belong to other sites
        assert_equals_live(folder, ORIGINAL / "depth2", overrides=overrides)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"order": ["math", "code"]}, "order: expected expert 'bio', which the checkpoint has"),
        ({"order": ["math", "code", "boi"]}, "order: the checkpoint has no expert 'boi' .*did you mean 'bio'"),
        ({"order": ["math", "math"]}, "order: expected a list of different expert names"),
        ({"layers": {"a": 0, "b": 2}}, "layers: expected an object that maps each module to another number"),
        ({"layers": {"a": 0, "b": 0}}, "layers: expected"),
        ({"layers": [1]}, "layers: expected"),
        ({"layer": {}}, "unknown key 'layer' .*did you mean 'layers'"),
    ],
)
def test_bad_ordering(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "ordering.json"
    path.write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(ORIGINAL / "depth1", overrides=Overrides(BASE.base, ordering=path))


def test_experts_of_another_base_are_refused(tmp_path: Path) -> None:
    """By shape, and by name where both names are hub ids; --base says that two names are the same weights."""
    folder = shutil.copytree(ORIGINAL / "depth1", tmp_path / "x")
    shutil.copytree(FIXTURES / "base", folder / "base")
    set_json("xlora_config.json", base_model_id="base")(folder)
    for name, base in {"math": "org/one", "code": "Org/One", "bio": "org/two"}.items():
        set_json(f"{name}/adapter_config.json", base_model_name_or_path=base)(folder)
    with pytest.raises(CheckpointError, match=r"bio/adapter_config.json: base_model_.*'org/one'.*'org/two'"):
        load_checkpoint(folder)
    assert_equals_live(folder, ORIGINAL / "depth1", overrides=BASE)
    edit_tensors("math/adapter_model.safetensors", lambda d: d.update({TENSOR: torch.ones(1, 17)}))(folder)
    with pytest.raises(CheckpointError, match=r"expected shape \[1, 16\], found \[1, 17\] .*another base"):
        load_checkpoint(folder, overrides=BASE)


def test_summary_says_which_layout() -> None:
    assert "X-LoRA PEFT save 'depth1'" in describe(load_checkpoint(SOUND / "depth1", overrides=BASE))
    assert "checkpoint of the original library 'depth2'" in describe(
        load_checkpoint(ORIGINAL / "depth2", overrides=BASE)
    )
