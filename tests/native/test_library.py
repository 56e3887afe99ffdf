"""How the library comes to a process: compiled once, kept, or brought by the installation; and what is told else."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.native import library
from service.native.build_folder import scratch_in
from service.native.step import NativeStep
from tests.support.driver import Engines, greedy, run, words
from tests.support.tiny import Tiny

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")

BUILT = Path(EngineOptions("").native_cache).expanduser()


def is_native(engine: Engine) -> bool:
    return isinstance(engine.runner.step, NativeStep)


def check_serves_without(engine: Engine) -> None:
    assert not is_native(engine)
    assert len(run(engine, [greedy("r", words(3, 9), 4)])["r"].tokens) == 4


def test_processes_that_start_together_compile_it_once(tmp_path: Path) -> None:
    """160 compilers at once have used up a machine's memory."""
    script = (
        "import os, sys, pathlib, shutil, time; from service.native import library\n"
        f"built = library.library_in(pathlib.Path({str(BUILT)!r}))\n"
        "def build(path):\n"  # what the compiler makes takes half a minute
        "    print('compiled', flush=True); time.sleep(0.2); shutil.copy(built, path)\n"
        "library.build = build\n"
        "child = os.fork()\n"  # two interpreters would import torch twice
        "library.provide(pathlib.Path(sys.argv[1]))\n"
        "sys.exit(os.waitpid(child, 0)[1] if child else 0)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "compiled\n")


def test_what_a_killed_build_has_left_is_removed(tmp_path: Path) -> None:
    """... once it is old; what is under way is not."""
    abandoned, running = tmp_path / "compiling-old", tmp_path / "compiling-new"
    abandoned.mkdir()
    running.mkdir()
    os.utime(abandoned, (1, 1))
    with scratch_in(tmp_path) as scratch:
        assert scratch.parent == tmp_path
    assert list(tmp_path.iterdir()) == [running]


def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "operators.cpp").write_text("this is no C++")
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match="could not be compiled"):
        library.provide(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()), "nothing is left"


def test_they_come_while_requests_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start on a machine: tokens from before and after are of one text. The next start has them at once."""
    engines = Engines(tiny.as_stored())
    requests = [greedy(f"r{i}", words(i, 9 * i), 40, return_scalings="full") for i in (1, 2)]
    expected = run(engines.build(native_kernels=False), requests)
    waiting: list[Any] = []
    steps: list[Any] = []
    monkeypatch.setattr(threading, "Thread", lambda **kwargs: _Held(waiting, **kwargs))
    engine = engines.build(native_cache=str(tmp_path), wait=False)
    assert not is_native(engine)

    def arrive(engine: Engine, output: Any) -> None:
        steps.append(output)
        if len(steps) == 10:
            shutil.copy(library.library_in(BUILT), tmp_path)
            waiting[0]()
            assert is_native(engine)

    ours = run(engine, requests, each_step=arrive)
    assert len(steps) > 20
    assert {key: choice.tokens for key, choice in ours.choices.items()} == {
        key: choice.tokens for key, choice in expected.choices.items()
    }
    assert is_native(engines.build(native_cache=str(tmp_path), wait=False))


class _Held:
    """A thread that does its work when the test says so."""

    def __init__(self, waiting: list[Any], target: Any, **_: Any) -> None:
        self._target, self._waiting = target, waiting

    def start(self) -> None:
        self._waiting.append(self._target)


def test_without_a_compiler_it_serves(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    engines = Engines(tiny.as_stored())
    engine = engines.build(native_cache=str(tmp_path))
    assert [text for text in engines.news if "no native kernels" in text and "install g++" in text] == engines.news
    assert not caplog.records
    check_serves_without(engine)


def test_a_portable_library_needs_no_compiler(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the image has them, beside the source; the best that suits the CPU is taken, and on a CPU of a lower level it
    is as if there were none. That each can be compiled and computes shows test_every_level, which takes minutes.
    """
    levels = library._PORTABLE[platform.machine()]
    installed = tmp_path / "package"
    installed.mkdir()
    monkeypatch.setattr(library, "_INSTALLED", installed)
    loaded: list[Path] = []
    monkeypatch.setattr(library, "load", loaded.append)
    monkeypatch.setattr("shutil.which", lambda _: None)
    for level in levels:
        library.library_in(installed, level).touch()
    for level, flags in levels.items():
        monkeypatch.setattr(library, "cpu_flags", lambda flags=flags: f"flags : {' '.join(flags)}")
        engines = Engines(tiny.as_stored())
        assert is_native(engines.build(native_cache=str(tmp_path / "cache")))
        assert loaded[-1] == library.library_in(installed, level)
        assert engines.news == [f"native kernels are in use: {loaded[-1]}"]
    monkeypatch.setattr(library, "cpu_flags", lambda: "flags : sse2")
    check_serves_without(Engines(tiny.as_stored()).build(native_cache=str(tmp_path / "cache")))


@pytest.mark.slow
def test_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the image's build compiles computes, in a process of its own: a library makes itself known to torch once."""
    monkeypatch.setattr(library, "_INSTALLED", tmp_path)
    here = set(library.cpu_flags().split())
    script = (
        "import sys, pathlib, torch; from service.native import library, operators\n"
        "library.load(pathlib.Path(sys.argv[1])); x, weight = torch.randn(2, 40), torch.randn(24, 40)\n"
        "torch.testing.assert_close(operators.linear(x, weight), torch.nn.functional.linear(x, weight))"
    )
    built = library.build_portable()
    for own, needed in zip(built, library._PORTABLE[platform.machine()].values(), strict=True):
        if needed <= here:
            subprocess.run([sys.executable, "-c", script, str(own)], check=True, timeout=120)


def test_a_cache_that_cannot_be_written_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    engine = Engines(tiny.as_stored()).build(native_cache=str(tmp_path / "file" / "cache"))
    assert "Not a directory" in caplog.text
    check_serves_without(engine)


def test_a_damaged_library_is_told(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.library_in(tmp_path).write_text("no library")
    monkeypatch.setattr(library, "_libraries", {})
    engine = Engines(tiny.as_stored()).build(native_cache=str(tmp_path))
    assert "no native kernels" in caplog.text
    check_serves_without(engine)
