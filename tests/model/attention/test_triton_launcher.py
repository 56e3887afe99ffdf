"""The C module that Triton compiles at first use, compiled beforehand: found, loaded, and no compiler asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if shutil.which("cc") is None:
    pytest.skip("needs a C compiler to build what is then used without", allow_module_level=True)

from service.model.attention.triton_launcher import ShippedCache, stand_in

ROOT = Path(__file__).parents[3]
MANAGER = f"{ShippedCache.__module__}:{ShippedCache.__qualname__}"
BUILD = """
import pathlib, sys
from service.model.attention import triton_launcher
triton_launcher.build(pathlib.Path(sys.argv[1]))
"""
USE = """
import pathlib, sys
from service.model.attention import triton_launcher
triton_launcher.SHIPPED = pathlib.Path(sys.argv[1])
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().load_binary)
"""


def python(code: str, argument: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(argument)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_found_without_a_compiler(tmp_path: Path) -> None:
    """And Triton's own cache is where its files go; without the manager there is no way."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    built = python(BUILD, shipped)
    assert built.returncode == 0, built.stderr
    assert len(list(shipped.rglob("*.so"))) == 1
    library = stand_in(tmp_path)
    bare = {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(own), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    bare["LD_LIBRARY_PATH"] = str(library.parent)
    without = python(USE, shipped, **bare)
    assert "Failed to find C compiler" in without.stderr
    found = python(USE, shipped, TRITON_CACHE_MANAGER=MANAGER, **bare)
    assert found.returncode == 0, found.stderr
    assert "load_binary" in found.stdout
    assert not list(own.rglob("*.so"))
