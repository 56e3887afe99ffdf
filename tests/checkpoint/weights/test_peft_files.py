"""What PEFT writes beside the adapter itself: copies of the base's embeddings, and fields that nobody has set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.checkpoint import describe, load_checkpoint
from service.contract.errors import CheckpointError
from tests.support.bundles import make_bundle
from tests.support.damage import edit_json, set_json

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_emb"
)
ADAPTER, GATE = "experts/math/adapter_config.json", "classifier/xlora_config.json"
COPY = "base_model.model.lm_head.base_layer.weight"
HEADS = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
NEUTRAL: list[Any] = [None, False, {}, [], ""]


@pytest.fixture(scope="module", params=HEADS)
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle whose head is tied to the embedding and adapted, and the embedding's name."""
    config = {"tie_word_embeddings": True}
    path = tmp_path_factory.mktemp("tied") / request.param
    make_bundle(path, architecture=request.param, experts=["math"], targets=["lm_head"], base_config=config)
    edit_json("bundle.json", lambda data: data.pop("sha256"))(path)
    return path, HEADS[request.param]


@pytest.fixture
def copied(tied: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    return shutil.copytree(tied[0], tmp_path / "tied"), tied[1]


def rewrite(bundle: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = bundle / "experts/math/adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("kept_as", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_as", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_tied_embedding(copied: tuple[Path, str], loaded_as: torch.dtype, kept_as: torch.dtype) -> None:
    """Of a base that was loaded in one precision for the training, and saved in another."""
    bundle, _ = copied

    def round_copy(tensors: dict[str, Tensor]) -> None:
        tensors[COPY] = tensors[COPY].to(loaded_as).to(kept_as)

    rewrite(bundle, round_copy)
    assert list(load_checkpoint(bundle).experts[0].weights) == ["lm_head"]


def test_a_trained_copy_is_refused(copied: tuple[Path, str]) -> None:
    bundle, _ = copied
    rewrite(bundle, lambda tensors: tensors.update({COPY: tensors[COPY] + 0.1}))
    with pytest.raises(
        CheckpointError, match=r"lm_head.base_layer.weight': expected a copy of the base's .* other values"
    ):
        load_checkpoint(bundle)


def test_save_embedding_layers(copied: tuple[Path, str]) -> None:
    """PEFT then writes embedding and head under the names of the base."""
    bundle, embedding = copied
    names = ("base_model.model.lm_head.weight", f"base_model.model.{embedding}.weight")
    rewrite(bundle, lambda tensors: tensors.update({name: tensors[COPY].clone() for name in names}))
    assert list(load_checkpoint(bundle).experts[0].weights) == ["lm_head"]


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    path = shutil.copytree(pristine, tmp_path / "tiny")
    (path / "experts/alpha").rename(path / "experts/math")
    edit_json("bundle.json", lambda data: data["experts"][0].update(path="experts/math"))(path)
    edit_json("bundle.json", lambda data: data.pop("sha256"))(path)
    return path


@pytest.mark.parametrize("value", NEUTRAL, ids=repr)
@pytest.mark.parametrize("file", [ADAPTER, GATE])
def test_an_unknown_field_that_asks_for_nothing(bundle: Path, file: str, value: Any) -> None:
    """Newer versions of PEFT write every field they know: a warning at load and in what `check` prints."""
    set_json(file, use_future=value)(bundle)
    lines: list[str] = []
    checkpoint = load_checkpoint(bundle, on_progress=lines.append)
    expected = f"{bundle / file}: unknown config key 'use_future' is ignored: {value!r} asks for nothing"
    assert f"warning: {expected}" in lines
    assert f"warning      {expected}" in describe(checkpoint).splitlines()


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "x", [0], {"a": None}], ids=repr)
@pytest.mark.parametrize("file", [ADAPTER, GATE])
def test_an_unknown_field_that_asks_for_something(bundle: Path, file: str, value: Any) -> None:
    set_json(file, use_future=value)(bundle)
    with pytest.raises(CheckpointError, match="unknown config key 'use_future'"):
        load_checkpoint(bundle)
