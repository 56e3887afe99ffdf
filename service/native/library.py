"""The compiled library of csrc/: builds it, finds it, loads it into this process, and sets its threads.

A C++ compiler builds it once per machine, in about half a minute, into a cache folder, under a hash of everything that
it depends on. An installation may have portable ones beside this file, built elsewhere for all CPUs of a level
(build_portable). operators.py declares its operators.
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
_INSTALLED = Path(__file__).parent  # of portable libraries
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_COMPILER = "g++"
_NATIVE = "native"  # for this very CPU
# By machine: the levels of portable libraries, best first, and the flags in /proc/cpuinfo that each needs.
_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_PORTABLE = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3},
    "aarch64": {"armv8-a": frozenset({"asimd"})},
}
_libraries: dict[str, Any] = {}  # loaded ones by file name
_helpers = 0, 0  # numbers of helpers: normal, and of idle priority
_loading = threading.Lock()  # guards both globals


def provide(cache: Path) -> Path:
    """Makes the operators usable in this process; compiles the library into `cache` if needed. Returns its path. Raises
    RuntimeError with the compiler's output, and OSError.
    """
    library = find_library(cache)
    if library is None:
        library = library_in(cache)
        with alone_in(cache):
            if not library.exists():
                build(library)
    load(library)
    return library


def is_available(cache: Path) -> bool:
    """Whether there is a library for `provide`, or a compiler to build it."""
    return find_library(cache) is not None or shutil.which(_COMPILER) is not None


def find_library(cache: Path) -> Path | None:
    """The library for this CPU in `cache`, else the best portable one of this installation that the CPU can run."""
    own, flags = library_in(cache), set(cpu_flags().split())
    levels = _PORTABLE.get(platform.machine(), {})
    places = [own, *(library_in(_INSTALLED, level) for level, needed in levels.items() if needed <= flags)]
    return next((library for library in places if library.exists()), None)


def sources() -> list[Path]:
    """The source files of the library."""
    return sorted(_SOURCES.glob("*.[ch]*"))


def library_in(folder: Path, level: str = _NATIVE) -> Path:
    """The path of the library, built or not; its name is a hash of sources, flags, torch and CPU."""
    cpu = cpu_flags() if level == _NATIVE else ""
    parts = ([source.read_text() for source in sources()], _FLAGS, level, torch.__version__, platform.machine(), cpu)
    return folder / f"kernels-{hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()}.so"


def build_portable() -> list[Path]:
    """Compiles the portable libraries of this kind of machine into this package, for an image or a wheel. Returns their
    paths, best first. Raises KeyError for a kind of machine without levels, and as build does.
    """
    libraries = []
    for level in _PORTABLE[platform.machine()]:
        libraries.append(library_in(_INSTALLED, level))
        build(libraries[-1], level)
    return libraries


def build(library: Path, level: str = _NATIVE) -> None:
    """Compiles `library`, at the lowest priority, and moves it into place when it is complete. Raises RuntimeError with
    the compiler's output, and OSError.
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
    """Makes the operators usable in this process. Raises OSError."""
    with _loading:
        if library.name not in _libraries:  # it registers with torch, which allows that only once
            _libraries[library.name] = ctypes.CDLL(str(library))
        _libraries[library.name].xlora_set_helpers(*_helpers)


def use_threads(count: int, idle_priority: int = 0) -> None:
    """Sets the threads of this process's kernels: `count`, of which one is the calling thread, and `idle_priority` more
    that run only while their core has nothing else to do. The defaults are 1 and 0.
    """
    global _helpers
    with _loading:
        _helpers = count - 1, idle_priority
        for library in _libraries.values():
            library.xlora_set_helpers(*_helpers)


def cpu_flags() -> str:
    """This CPU's instruction sets by /proc/cpuinfo, all of which the code may use; empty where that is missing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
