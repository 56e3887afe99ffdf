"""Hub ids, against a cache in huggingface_hub's layout: there is no hub in the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from service.checkpoint import Overrides, load_checkpoint
from service.checkpoint.sources import is_hub_id, same_repository
from service.contract.errors import CheckpointError
from tests.checkpoint.formats.test_layouts import FIXTURES, ORIGINAL, assert_equals_live
from tests.support.damage import set_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    return path


def put(cache: Path, repository: str, source: Path) -> Path:
    """`source` as the cache has it after a download: links from the snapshot to blobs; returns the snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in source.rglob("*") if path.is_file()):
        blob = folder / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    for name in ("main", "v1"):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_whole_repository_with_its_base_and_an_expert_elsewhere(cache: Path, tmp_path: Path, revision: str) -> None:
    source = shutil.copytree(ORIGINAL / "depth4", tmp_path / "source")
    shutil.rmtree(source / "tales")
    adapters = {"math": "x", "code": "x", "bio": "x", "tales": "org/tales"}
    set_json("xlora_config.json", base_model_id="org/base", adapters=adapters)(source)
    put(cache, "org/mixture", source)
    put(cache, "org/base", FIXTURES / "base")
    put(cache, "org/tales", FIXTURES / "experts/e3")
    checkpoint = load_checkpoint(f"org/mixture{revision}")
    assert (checkpoint.name, checkpoint.base_reference) == ("mixture", "org/base")
    assert_equals_live(f"org/mixture{revision}", ORIGINAL / "depth4")  # type: ignore[arg-type]


def test_flags_take_hub_ids_and_a_snapshot_is_a_folder(cache: Path) -> None:
    put(cache, "org/base", FIXTURES / "base")
    put(cache, "org/math", FIXTURES / "experts/e0")
    snapshot = put(cache, "org/mixture", ORIGINAL / "depth1")
    assert_equals_live(snapshot, ORIGINAL / "depth1", overrides=Overrides("org/base", {"math": "org/math"}))


@pytest.mark.parametrize(
    ("model", "overrides", "expected"),
    [
        ("org/none", Overrides(), "--model: no folder 'org/none' here, .* not in the local cache"),
        (str(ORIGINAL / "depth1"), Overrides("org/none"), "--base: no folder 'org/none' here, .*switched off"),
        (
            str(ORIGINAL / "depth1"),
            Overrides(str(FIXTURES / "base"), {"bio": "o/n@v2"}),
            "--expert bio: no folder 'o/n@v2'",
        ),
    ],
)
def test_what_is_not_in_the_cache_is_named(cache: Path, model: str, overrides: Overrides, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(model, overrides=overrides)


def test_ids() -> None:
    assert is_hub_id("org/name")
    assert is_hub_id("org/na.me-2@refs/pr/1")
    assert not any(map(is_hub_id, ("name", "./org/name", "../x", "/a/b", "a/b/c", "org/name@", "")))
    assert same_repository("Org/Name@v1", "org/name")
