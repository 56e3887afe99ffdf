"""The library of csrc/: how it is built, where it lies, how a process gets and divides it.

Built in seconds by a C++ compiler, once per machine, and kept in a folder under the name of all that it depends on. An
installation may have one that was built elsewhere for every CPU of a level (build_portable), beside this file.
operators.py declares what is in it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch

from service.native.build_folder import alone_in, scratch_in

_SOURCES = Path(__file__).with_name("csrc")
_INSTALLED = Path(__file__).parent  # where portable libraries are
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_COMPILER = "g++"
_NATIVE = "native"  # for this very CPU
# By machine: the levels that portable libraries are built for, best first, and what /proc/cpuinfo must name for each.
_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_PORTABLE = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3},
    "aarch64": {"armv8-a": frozenset({"asimd"})},
}
_libraries: dict[str, Any] = {}  # loaded ones by file name
_helpers = 0, 0  # of each: threads, guests
_loading = threading.Lock()  # guards both


def provide(cache: Path) -> Path:
    """Makes the operators work in this process; compiles the library into `cache` where there is none yet, in seconds.
    Returns where it is. Raises RuntimeError with what the compiler said, OSError.
    """
    library = find_library(cache)
    if library is None:
        library = library_in(cache)
        with alone_in(cache):
            if not library.exists():
                build(library)
    load(library)
    return library


def can_be_had(cache: Path) -> bool:
    """Whether `provide` has something to work with: a library, or a compiler."""
    return find_library(cache) is not None or shutil.which(_COMPILER) is not None


def find_library(cache: Path) -> Path | None:
    """The library for this CPU in `cache`, else the best portable one of this installation that the CPU suits."""
    own, flags = library_in(cache), set(cpu_flags().split())
    levels = _PORTABLE.get(platform.machine(), {})
    places = [own, *(library_in(_INSTALLED, level) for level, needed in levels.items() if needed <= flags)]
    return next((library for library in places if library.exists()), None)


def sources() -> list[Path]:
    """What the library is compiled from."""
    return sorted(_SOURCES.glob("*.[ch]*"))


def library_in(folder: Path, level: str = _NATIVE) -> Path:
    """Where the library is or will be: named after sources, flags, torch and CPU."""
    cpu = cpu_flags() if level == _NATIVE else ""
    parts = ([source.read_text() for source in sources()], _FLAGS, level, torch.__version__, platform.machine(), cpu)
    return folder / f"kernels-{hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()}.so"


def build_portable() -> list[Path]:
    """Compiles the libraries for all CPUs that suit them into this package, for an image or a wheel. Returns where they
    are, best first; raises KeyError for a kind of machine that has no level, else as build does.
    """
    libraries = []
    for level in _PORTABLE[platform.machine()]:
        libraries.append(library_in(_INSTALLED, level))
        build(libraries[-1], level)
    return libraries


def build(library: Path, level: str = _NATIVE) -> None:
    """Compiles `library`, at the lowest priority; it is there as a whole or not at all. Raises RuntimeError with what
    the compiler said, OSError.
    """
    torch_folder = Path(torch.__file__).parent
    with scratch_in(library.parent) as scratch:
        made = scratch / library.name
        command = [
            *("nice", "-n", "19", _COMPILER, *_FLAGS, f"-march={level}"),
            *(str(_SOURCES / "operators.cpp"), "-o", str(made)),
            *(f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"native kernels could not be compiled: {done.stderr.strip()}")
        os.replace(made, library)


def load(library: Path) -> None:
    """Makes the operators work in this process. Raises OSError."""
    with _loading:
        if library.name not in _libraries:  # it makes itself known to torch, which wants to hear it once
            _libraries[library.name] = ctypes.CDLL(str(library))
        _libraries[library.name].xlora_set_helpers(*_helpers)


def use_threads(count: int, guests: int = 0) -> None:
    """From now on, kernels of this process compute in the thread that calls them and in `count` - 1 others; `guests`
    more help where a core has nothing else to do. 1 and 0 until somebody says so.
    """
    global _helpers
    with _loading:
        _helpers = count - 1, guests
        for library in _libraries.values():
            library.xlora_set_helpers(*_helpers)


def cpu_flags() -> str:
    """The instructions that this CPU has, where Linux tells: code is compiled for all of them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
