"""Compiles the decode step beside the running engine: in a process of its own, at the lowest priority.

The engine serves eagerly until the package is there, and switches between two steps. A package is kept in the cache
directory under the fingerprint of all that it depends on, so the next start finds it; one that cannot be loaded is
compiled again. Where compiling fails, the reason is logged once and the engine goes on eagerly.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from service.engine.options import EngineOptions
from service.model.compiled import CompiledStep, fingerprint
from service.model.xlora_model import XLoraModel

logger = logging.getLogger(__name__)

_WORKER = "service.engine.compile_worker"


class Compilation:
    """One compilation, from the cache or on its way. `on_ready` gets the step, and then `on_progress` the news, perhaps
    in another thread.
    """

    def __init__(
        self,
        model: XLoraModel,
        options: EngineOptions,
        on_ready: Callable[[CompiledStep], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self._model = model
        self._options = options
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._path = cache_path(model, options)
        self._done = threading.Event()
        if self._path.exists() and self._load("compiling it again"):
            self._done.set()
        else:
            threading.Thread(target=self._run, name="compilation", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits until the outcome is known. Returns False when it is not after `seconds`."""
        return self._done.wait(seconds)

    def _run(self) -> None:
        reason = self._compile()
        if reason is None:
            self._load("serving without")
        else:
            logger.warning("the step could not be compiled, serving without: %s", reason)
        self._done.set()

    def _compile(self) -> str | None:
        """Runs the compiling process to its end. Returns why there is no package, or None."""
        if shutil.which("g++") is None:
            return "it takes a C++ compiler, and g++ was not found (install g++)"
        shutil.rmtree(self._path, ignore_errors=True)  # one that could not be loaded
        command = [sys.executable, "-m", _WORKER, str(self._path)]
        try:
            # The child reads its options, then waits for the end of the same pipe: it dies with this process.
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            ) as child:
                assert child.stdin is not None
                assert child.stderr is not None
                child.stdin.write(json.dumps(asdict(self._options)).encode() + b"\n")
                child.stdin.flush()
                lines = child.stderr.read().decode(errors="replace").strip().splitlines()
        except OSError as error:  # no process could be started, or it was gone before it read anything
            return str(error)
        if child.returncode == 0:
            return None
        return lines[-1] if lines else f"the compiling process ended with {child.returncode}"

    def _load(self, otherwise: str) -> bool:
        try:
            self._on_ready(CompiledStep(self._path, self._model, self._options.block_size))
        except Exception as error:
            logger.warning("the compiled step %s cannot be loaded, %s: %r", self._path, otherwise, error)
            return False
        self._on_progress(f"the compiled step is in use: {self._path}")
        return True


def cache_path(model: XLoraModel, options: EngineOptions) -> Path:
    """Where the packages for this model, these options and this machine are or will be."""
    name = fingerprint(model, model.kv_layout(options.block_size), torch.get_num_threads())
    return Path(options.compile_cache).expanduser() / name
