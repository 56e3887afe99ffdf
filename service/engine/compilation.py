"""Compiles the decode step beside the running engine: in a process of its own, at the lowest priority.

The engine serves eagerly until the package is there, and switches between two steps. A package is kept in the cache
directory under the fingerprint of all that it depends on, so the next start finds it. Where compiling fails, the reason
is logged once and the engine goes on eagerly.
"""

from __future__ import annotations

import json
import logging
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
    """One compilation, from the cache or on its way. `on_ready` gets the step, perhaps in another thread."""

    def __init__(self, model: XLoraModel, options: EngineOptions, on_ready: Callable[[CompiledStep], None]) -> None:
        self._model = model
        self._options = options
        self._on_ready = on_ready
        self._path = cache_path(model, options)
        self._done = threading.Event()
        if self._path.exists():
            self._load()
        else:
            threading.Thread(target=self._run, name="compilation", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits until the outcome is known. Returns False when it is not after `seconds`."""
        return self._done.wait(seconds)

    def _run(self) -> None:
        command = [sys.executable, "-m", _WORKER, str(self._path)]
        # The child reads its options, then waits for the end of the same pipe: it dies with this process.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as child:
            assert child.stdin is not None
            assert child.stderr is not None
            child.stdin.write(json.dumps(asdict(self._options)).encode() + b"\n")
            child.stdin.flush()
            lines = child.stderr.read().decode(errors="replace").strip().splitlines()
            child.stdin.close()
        if child.returncode == 0:
            self._load()
            return
        logger.warning("the step could not be compiled, serving without: %s", lines[-1] if lines else child.returncode)
        self._done.set()

    def _load(self) -> None:
        try:
            self._on_ready(CompiledStep(self._path, self._model, self._options.block_size))
            logger.info("the compiled step is in use: %s", self._path)
        except Exception:
            logger.exception("the compiled step %s cannot be loaded, serving without", self._path)
        self._done.set()


def cache_path(model: XLoraModel, options: EngineOptions) -> Path:
    """Where the packages for this model, these options and this machine are or will be."""
    name = fingerprint(model, model.kv_layout(options.block_size), torch.get_num_threads())
    return Path(options.compile_cache).expanduser() / name
