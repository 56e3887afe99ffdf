"""Adapters that PEFT has written, for every family that stores its weights in a way of its own: served with PEFT's
numbers, or refused for the true reason. Older versions: tests/support/peft_versions.py.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from service.checkpoint import load_checkpoint
from tests.support.adapters import CASES, write_case
from tests.support.damage import edit_json
from tests.support.peft_versions import assert_served_as_peft

CONFIGS = Path(__file__).parents[1] / "fixtures/adapter_configs"  # of `llama, one layer, ranks, rsLoRA`, by version


@pytest.mark.filterwarnings("ignore")  # PEFT has something to say of most of these
@pytest.mark.parametrize("name", CASES)
def test_adapters_as_peft_saves_them(name: str, tmp_path: Path) -> None:
    write_case(tmp_path, CASES[name])
    assert_served_as_peft(tmp_path, CASES[name])


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case whose every setting is in adapter_config.json: ranks and scales by pattern, rsLoRA, one layer."""
    path = tmp_path_factory.mktemp("patterns") / "bundle"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_case(path, CASES["llama, one layer, ranks, rsLoRA"])
    edit_json("bundle.json", lambda data: data.pop("sha256"))(path)
    return path


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_configuration_as_this_version_writes_it(config: Path, patterns: Path, tmp_path: Path) -> None:
    """The same ranks and scales, and nothing to warn of: versions differ in the fields that they have."""
    bundle = shutil.copytree(patterns, tmp_path / "bundle")
    shutil.copyfile(config, bundle / "experts/math/adapter_config.json")
    checkpoint = load_checkpoint(bundle)
    expected = load_checkpoint(patterns).experts[0].weights
    found = checkpoint.experts[0].weights
    assert {site: (own.rank, own.scale) for site, own in found.items()} == {
        site: (own.rank, own.scale) for site, own in expected.items()
    }
    assert {own.rank for own in found.values()} == {4, 3}
    assert checkpoint.warnings == ()
