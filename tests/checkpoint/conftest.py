"""One good bundle per session; every test works on a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tests.support.damage import edit_json


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never modified. Depth 3 and layerwise: all kinds of classifier tensors exist. Has a draft head and a layer."""
    path = tmp_path_factory.mktemp("pristine") / "tiny"
    xlora = {"xlora_depth": 3, "layerwise_scalings": True}
    return make_bundle(path, xlora=xlora, gate_profile={"entropy": 0.5}, draft_head=6, draft_depth=3)


@pytest.fixture
def hashed(pristine: Path, tmp_path: Path) -> Path:
    """A copy with the hashes that the writer recorded."""
    return shutil.copytree(pristine, tmp_path / "tiny")


@pytest.fixture
def bundle(hashed: Path) -> Path:
    """A copy without hashes, so that one damage is one defect."""
    edit_json("bundle.json", lambda data: data.pop("sha256"))(hashed)
    return hashed
