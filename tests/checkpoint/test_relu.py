"""Whether ReLU stands between the gate's layers is read from the tensors' names; a statement that contradicts them, and
silence where they do not tell, are refused. The oracles: scalings of the libraries' live models, and the MLP in torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from service.checkpoint import Overrides, load_checkpoint
from service.cli import main
from service.contract.errors import CheckpointError
from service.model.classifier import Classifier
from tests.checkpoint.formats.test_layouts import FIXTURES, ORIGINAL, SOUND, assert_equals_live
from tests.support.damage import edit_json, edit_tensors, set_json

BASE = str(FIXTURES / "base")
CONFIG, GATE = "xlora_config.json", "xlora_classifier.safetensors"
BUNDLE_CONFIG, BUNDLE_GATE = f"classifier/{CONFIG}", f"classifier/{GATE}"
FIELD = "enable_relu_and_dropout"
without_key = edit_json(CONFIG, lambda data: data.pop(FIELD))


def stating(value: bool) -> Any:
    return set_json(CONFIG, **{FIELD: value})


def said(value: bool | None = None) -> Overrides:
    return Overrides(BASE, gate_relu=value)


@pytest.fixture
def save(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the save that the test's parameter `case` names."""
    return shutil.copytree(ORIGINAL / request.getfixturevalue("case"), tmp_path / "save")


@pytest.mark.parametrize("case", ["depth4", "linear4", "depth1"])
def test_names_tell_where_nothing_is_stated(save: Path, case: str) -> None:
    """inner.0, 3, 6 have ReLU and Dropout between them, inner.0, 1, 2 have nothing; one layer has nothing to tell."""
    without_key(save)
    assert_equals_live(save, ORIGINAL / case, overrides=said())


@pytest.mark.parametrize(("case", "names"), [("depth4", "inner.0, inner.3, inner.6"), ("linear4", "inner.0, inner.1")])
def test_a_statement_against_the_names_is_refused(save: Path, case: str, names: str) -> None:
    relu = case == "depth4"
    stating(not relu)(save)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save, overrides=said())
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for fragment in (GATE, names, f"{FIELD} is {str(not relu).lower()}", f"--gate-relu {str(relu).lower()}"):
        assert fragment in message
    assert_equals_live(save, ORIGINAL / case, overrides=said(relu))  # the operator has looked


@pytest.mark.parametrize("case", ["depth4", "linear4"])
def test_the_flag_against_the_names_is_refused(save: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match=f"are numbered .*and {FIELD} is"):
        load_checkpoint(save, overrides=said(case != "depth4"))


@pytest.mark.parametrize("case", ["depth2", "linear2"])
def test_one_inner_layer_about_which_nothing_is_stated(
    save: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library's default has changed, so it says nothing: the flag does. The other value gives other scalings."""
    without_key(save)
    with pytest.raises(CheckpointError, match=f"{GATE}: {FIELD}: expected in .*--gate-relu true, or false"):
        load_checkpoint(save, overrides=said())
    relu = case == "depth2"
    assert_equals_live(save, ORIGINAL / case, overrides=said(relu))
    with pytest.raises(AssertionError):
        assert_equals_live(save, ORIGINAL / case, overrides=said(not relu))
    assert main(["check", str(save), "--base", BASE]) == 1
    assert "--gate-relu" in capsys.readouterr().err
    assert main(["check", str(save), "--base", BASE, "--gate-relu", str(relu).lower()]) == 0
    target = save.parent / "bundle"
    assert main(["convert", str(save), str(target), "--base", BASE, "--gate-relu", str(relu).lower()]) == 0
    assert_equals_live(target, ORIGINAL / case)  # the bundle states it


@pytest.mark.parametrize("case", ["depth2"])
def test_a_flag_that_is_no_truth_value(save: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(save), "--base", BASE, "--gate-relu", "perhaps"]) == 1
    assert capsys.readouterr().err.startswith("error: --gate-relu 'perhaps'")


def renumber(numbers: dict[int, int]) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        moved = {name: tensors.pop(name) for name in list(tensors) if name.startswith("inner.")}
        for name, tensor in moved.items():
            _, number, kind = name.split(".")
            tensors[f"inner.{numbers[int(number)]}.{kind}"] = tensor

    return change


@pytest.mark.parametrize("numbers", [(0, 2, 4), (0, 3, 4), (1, 2, 3), (0, 4, 8)])
@pytest.mark.parametrize("case", ["depth4"])
def test_names_that_no_way_of_counting_gives(save: Path, case: str, numbers: tuple[int, ...]) -> None:
    edit_tensors(GATE, renumber(dict(zip((0, 3, 6), numbers, strict=True))))(save)
    with pytest.raises(CheckpointError, match=f"layers called inner.0, inner.1, .* found inner.{numbers[0]}, "):
        load_checkpoint(save, overrides=said())


@pytest.mark.parametrize(
    ("numbers", "stated", "relu"),
    [((0, 3), None, True), ((0, 1), None, False), ((0, 3), True, True), ((0, 1), False, False)],
)
def test_a_bundle_s_names_decide(bundle: Path, numbers: tuple[int, int], stated: bool | None, relu: bool) -> None:
    """The scalings are those of the MLP that torch makes of the tensors; one with the other activation differs."""
    edit_tensors(BUNDLE_GATE, renumber(dict(zip((0, 3), numbers, strict=True))))(bundle)
    edit_json(BUNDLE_CONFIG, lambda d: d.pop(FIELD) if stated is None else d.update({FIELD: stated}))(bundle)
    checkpoint = load_checkpoint(bundle)
    assert checkpoint.xlora.enable_relu_and_dropout is relu
    assert checkpoint.sites is not None
    sites = len(checkpoint.sites)
    ours = Classifier(checkpoint.classifier, checkpoint.xlora, 3, sites, torch.device("cpu"))
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    for activation, same in ((relu, True), (not relu, False)):
        theirs = plain_mlp(bundle / BUNDLE_GATE, activation)(hidden).view(7, sites, 3).softmax(-1)
        assert torch.allclose(ours(hidden), theirs, atol=1e-5) is same


def plain_mlp(path: Path, relu: bool) -> nn.Sequential:
    tensors = load_file(path)
    prefixes = sorted({name.rpartition(".")[0] for name in tensors if "inner" in name}, key=lambda p: int(p[6:]))
    modules: list[nn.Module] = []
    for prefix in [*prefixes, "last"]:
        weight = tensors[f"{prefix}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": tensors[f"{prefix}.bias"]})
        modules += [linear, nn.ReLU() if relu else nn.Identity()]
    return nn.Sequential(*modules[:-1]).requires_grad_(False)


def test_a_bundle_that_contradicts_itself(bundle: Path) -> None:
    set_json(BUNDLE_CONFIG, **{FIELD: False})(bundle)
    with pytest.raises(CheckpointError, match=r"inner\.0, inner\.3 are numbered with ReLU and Dropout"):
        load_checkpoint(bundle)


@pytest.mark.parametrize(
    ("numbers", "stated", "problem"),
    [((0, 1), None, "found layers.0, layers.1"), ((0, 3), False, f"{FIELD} is false"), ((0, 3), None, None)],
)
def test_a_peft_save_has_relu(
    tmp_path: Path, numbers: tuple[int, int], stated: bool | None, problem: str | None
) -> None:
    """PEFT puts one between any two layers: names without room for it are not PEFT's."""
    folder = shutil.copytree(SOUND / "depth2", tmp_path / "save")
    prefix = "base_model.internal_xlora_classifier.layers"

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for kind in ("weight", "bias"):
            tensors[f"{prefix}.{numbers[1]}.{kind}"] = tensors.pop(f"{prefix}.3.{kind}")

    edit_tensors("adapter_model.safetensors", move)(folder)
    if stated is not None:
        set_json("adapter_config.json", **{FIELD: stated})(folder)
    if problem is None:
        assert_equals_live(folder, SOUND / "depth2", overrides=said())
    else:
        with pytest.raises(CheckpointError, match=problem):
            load_checkpoint(folder, overrides=said())


def drop_bias(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("bias")]:
        del tensors[name]


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "biases, and use_bias false": (set_json(CONFIG, use_bias=False), r"unexpected tensor .*bias.*use_bias is false"),
    "no biases, and use_bias true": (edit_tensors(GATE, drop_bias), r"missing tensor .*bias.*use_bias is true"),
    "fewer layers": (set_json(CONFIG, xlora_depth=5), "missing tensor 'inner.9.weight': xlora_depth 5 expects 4 inner"),
    "more layers": (set_json(CONFIG, xlora_depth=3), "unexpected tensor 'inner.6.weight': xlora_depth 3 expects 2"),
    "no depth": (edit_json(CONFIG, lambda data: data.pop("xlora_depth")), "xlora_depth 1 expects 0 inner layers"),
    "a depth of 10^9": (set_json(CONFIG, xlora_depth=10**9), "missing tensor 'inner.9.weight'"),
    "another width": (set_json(CONFIG, xlora_size=9), r"expected shape \[9, 16\], found \[8, 16\]"),
    "layerwise": (set_json(CONFIG, layerwise_scalings=True), r"'last.weight': expected shape \[24, 8\] \(6 sites"),
}


@pytest.mark.parametrize("case", ["depth4"])
@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_what_else_the_tensors_contradict(save: Path, case: str, contradiction: str) -> None:
    damage, expected = CONTRADICTIONS[contradiction]
    damage(save)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(save, overrides=said())


@pytest.mark.parametrize("case", ["depth4", "depth2"])
def test_early_saves_keep_the_experts_in_a_folder_of_their_own(save: Path, case: str) -> None:
    """adapters/NAME, and adapters itself for the expert that PEFT calls "default"."""
    (save / "adapters").mkdir()
    for file in [file for file in save.iterdir() if file.is_dir() or file.name.startswith("adapter_")]:
        if file.name != "adapters":
            file.rename(save / "adapters" / file.name)
    checkpoint = load_checkpoint(save, overrides=said())
    assert {expert.folder.relative_to(save).parts[0] for expert in checkpoint.experts} == {"adapters"}
    assert_equals_live(save, ORIGINAL / case, overrides=said())


@pytest.mark.parametrize("case", ["depth4"])
def test_a_later_save_in_the_folder_of_an_early_one(save: Path, case: str) -> None:
    """The classifier is the later one's, and so are the experts beside it."""
    for expert in ("math", "code"):
        early = shutil.copytree(save / expert, save / "adapters" / expert) / "adapter_model.safetensors"
        save_file({name: tensor * 9 for name, tensor in load_file(early).items()}, early)
    assert_equals_live(save, ORIGINAL / case, overrides=said())
