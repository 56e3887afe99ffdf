"""The C++ kernels on a CPU: loaded at once where they have been built, else compiled beside the running engine.

Until they are there, and where they cannot be had, steps are made of torch's operators; only speed differs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from service.engine.options import EngineOptions
from service.model import kernel_library

logger = logging.getLogger(__name__)


class NativeKernels:
    """Their way into this process. `on_ready` is called once they work, and `on_progress` with what has become of them,
    perhaps in another thread.
    """

    def __init__(
        self, options: EngineOptions, on_ready: Callable[[], None], on_progress: Callable[[str], None]
    ) -> None:
        self._cache = Path(options.native_cache).expanduser()
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._done = threading.Event()
        if kernel_library.find_library(self._cache) is not None:
            self._provide()
        else:
            threading.Thread(target=self._provide, name="native kernels", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits until the outcome is known. Returns False when it is not after `seconds`."""
        return self._done.wait(seconds)

    def _provide(self) -> None:
        try:
            if kernel_library.can_be_had(self._cache):
                library = kernel_library.provide(self._cache)
                self._on_ready()
                self._on_progress(f"native kernels are in use: {library}")
            else:
                self._on_progress("no native kernels, decode steps are slower: g++ was not found (install g++)")
        except (OSError, RuntimeError) as error:
            logger.warning("no native kernels, decode steps are slower: %s", error)
        self._done.set()
