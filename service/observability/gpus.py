"""Memory and use of the GPUs that this process may see, from NVIDIA's management library (NVML). A leaf: no torch, no
CUDA context.

Needs the extra `gpu`, and a driver; without them there are no GPUs here. In a container NVML shows those that were
given to it, elsewhere all of the machine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

try:
    import pynvml
except ImportError:  # the extra `gpu` is not installed
    pynvml = None

logger = logging.getLogger("xlora.metrics")


@dataclass(frozen=True)
class Gpu:
    """One GPU at one moment."""

    index: int  # NVML's own order, as nvidia-smi has it
    uuid: str
    name: str
    used_bytes: int
    total_bytes: int
    busy_ratio: float | None  # None: it does not say, as a part of a divided GPU (MIG)


class Gpus:
    """The GPUs, or none. What NVML refuses for one of them is left out, and is tried again with the next reading."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._handles: list[tuple[int, Any, str, str]] = []  # index, handle, UUID, name
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            self._handles = [
                (index, handle, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle))
                for index, handle in enumerate(handles)
            ]
        except nvml.NVMLError as error:
            logger.debug("no metrics of GPUs: %s", error)

    def read(self) -> list[Gpu]:
        """The GPUs of which NVML says something now."""
        return [gpu for known in self._handles if (gpu := self._read(*known)) is not None]

    def _read(self, index: int, handle: Any, uuid: str, name: str) -> Gpu | None:
        nvml = self._nvml
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:  # it has fallen off the bus, or is in error
            return None
        try:
            busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except nvml.NVMLError:
            busy = None
        return Gpu(index, uuid, name, memory.used, memory.total, busy)
