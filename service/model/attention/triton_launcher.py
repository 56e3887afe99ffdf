"""Builds Triton's launcher when an image is built, so that the container needs no C compiler.

Triton launches kernels through a small C module that it compiles at first use. That needs a C compiler, and a cache
folder from which libraries may be loaded (a container's /tmp is often mounted noexec); an image has neither. So the
module is built with the image, and TRITON_CACHE_MANAGER=service.model.attention.triton_launcher:ShippedCache makes
Triton find it. Compiled GPU kernels stay in Triton's own cache. Importing this file needs Triton.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime.cache import FileCacheManager

SHIPPED = Path(sys.prefix) / "share" / "triton"


class ShippedCache(FileCacheManager):
    """Triton's file cache, which looks first for files that were shipped with the image."""

    def get_file(self, filename: str) -> str | None:
        """Returns the path of a file, or None. Triton's key of the module depends on programs on the PATH, so a shipped
        module is found by its file name and the hash of its source.
        """
        shipped = next((SHIPPED / _source_hash()).glob(f"*/{filename}"), None)
        if shipped is not None:
            return str(shipped)
        found: str | None = super().get_file(filename)
        return found


def build(folder: Path = SHIPPED) -> None:
    """Compiles the module into `folder`. Needs a C compiler, but no driver: it is linked with a stand-in.

    Raises RuntimeError or CalledProcessError when compiling fails.
    """
    with tempfile.TemporaryDirectory() as work:
        library = stand_in(Path(work))
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        knobs.nvidia.libcuda_path = work
        knobs.cache.dir = str(folder / _source_hash())
        driver.CudaUtils()


def stand_in(folder: Path) -> Path:
    """Compiles a libcuda.so.1 in `folder` that has the driver's symbols and does nothing. Returns its path."""
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", _source().decode())))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def _source() -> bytes:
    return Path(driver.__file__).with_name("driver.c").read_bytes()


@functools.cache
def _source_hash() -> str:
    return hashlib.sha256(_source()).hexdigest()
