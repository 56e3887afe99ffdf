"""Adapters that PEFT has written, for every family that stores its weights in a way of its own: served with PEFT's
numbers, or refused for the true reason. Older versions: tests/support/peft_versions.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapters import CASES, write_case
from tests.support.peft_versions import assert_served_as_peft


@pytest.mark.filterwarnings("ignore")  # PEFT has something to say of most of these
@pytest.mark.parametrize("name", CASES)
def test_adapters_as_peft_saves_them(name: str, tmp_path: Path) -> None:
    write_case(tmp_path, CASES[name])
    assert_served_as_peft(tmp_path, CASES[name])
