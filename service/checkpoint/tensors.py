"""Reading safetensors: headers with exact errors, one pass that hashes and looks for NaN and Inf, single tensors.

Knows the file format, not what the tensors are for. Never holds more than one tensor or one buffer in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from service.checkpoint.defects import Defects, defect

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BUFFER_BYTES = 1 << 20  # fits a core's cache, so that the second look at the bytes is nearly free


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One header entry; `start` and `end` are byte offsets into the file's data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been read and checked; tensors in file order."""

    path: Path
    tensors: dict[str, TensorInfo]
    data_start: int
    size_bytes: int


def read_header(path: Path) -> TensorFile:
    """Read and check the header: sizes, dtypes, and that the tensors fill the file exactly."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                problem = f"corrupt or truncated safetensors: a header of {length} bytes, found {size} bytes in all"
                raise defect(path, problem)
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise defect(path, f"corrupt safetensors: the header is not readable: {error}") from error
    if not isinstance(header, dict):
        raise defect(path, "corrupt safetensors: the header is not a JSON object")
    header.pop("__metadata__", None)
    infos = sorted((_tensor_info(path, name, entry) for name, entry in header.items()), key=lambda i: (i.start, i.end))
    _check_layout(path, infos, data_bytes=size - 8 - length)
    return TensorFile(path, {info.name: info for info in infos}, 8 + length, size)


def scan(file: TensorFile, defects: Defects) -> str:
    """Hash the file and report every tensor with NaN or Inf, in one pass over the bytes; returns the SHA-256."""
    digest = hashlib.sha256()
    buffer = bytearray(BUFFER_BYTES)
    with file.path.open("rb") as handle:
        digest.update(handle.read(file.data_start))
        for info in file.tensors.values():
            found = _scan_tensor(handle, info, buffer, digest)
            if found:
                problem = f"tensor {info.name!r}: expected finite values, found {found}"
                defects.add(defect(file.path, problem, "the weights are damaged or training diverged"))
    return digest.hexdigest()


def read_tensors(file: TensorFile) -> dict[str, torch.Tensor]:
    """Every tensor of the file, on the CPU, in its own dtype."""
    try:
        with safe_open(file.path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in file.tensors}
    except (SafetensorError, OSError) as error:
        raise defect(file.path, f"corrupt safetensors: {error}") from error


def read_tensor(file: TensorFile, name: str) -> torch.Tensor:
    """One tensor of the file, on the CPU, in its own dtype."""
    try:
        with safe_open(file.path, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise defect(file.path, f"corrupt safetensors: {error}") from error


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
            raise ValueError("sizes and offsets are whole numbers")
    except (TypeError, KeyError, ValueError) as error:
        raise defect(path, f"corrupt safetensors: tensor {name!r} has the header entry {entry!r:.80}") from error
    if dtype not in DTYPES:
        problem = f"tensor {name!r}: expected dtype {', '.join(DTYPES)}, found {dtype}"
        raise defect(path, problem, "quantised weights are not supported; save it as bfloat16")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != expected:
        problem = f"corrupt safetensors: tensor {name!r} of shape {list(shape)}: expected {expected} bytes"
        raise defect(path, f"{problem}, found {end - start}")
    return TensorInfo(name, dtype, shape, start, end)


def _check_layout(path: Path, infos: list[TensorInfo], data_bytes: int) -> None:
    """Without holes and overlaps, up to the last byte; else offsets could show one tensor's bytes as another's."""
    end = infos[-1].end if infos else 0
    if end > data_bytes:
        name = next(info.name for info in infos if info.end > data_bytes)
        problem = f"truncated: tensor {name!r} lies beyond the end: expected {end} bytes of data, found {data_bytes}"
        raise defect(path, problem, "copy or download the file again")
    if end < data_bytes:
        raise defect(path, f"corrupt safetensors: expected {end} bytes of data, found {data_bytes}")
    for before, after in itertools.pairwise([TensorInfo("", "F32", (), 0, 0), *infos]):
        if before.end != after.start:
            problem = f"tensor {after.name!r}: expected to start at byte {before.end}, found {after.start}"
            raise defect(path, f"corrupt safetensors: {problem}")


def _scan_tensor(handle: BinaryIO, info: TensorInfo, buffer: bytearray, digest: Any) -> str | None:
    """Feed one tensor's bytes to `digest`; returns "NaN" or "Inf" when it holds one."""
    view = memoryview(buffer)
    found = None
    remaining = info.end - info.start
    while remaining:
        count = min(remaining, len(buffer))
        if handle.readinto(view[:count]) != count:  # type: ignore[attr-defined]
            return "the end of the file: it changed while it was being read"
        digest.update(view[:count])
        remaining -= count
        dtype = DTYPES[info.dtype]
        low, high = torch.aminmax(torch.frombuffer(buffer, dtype=dtype, count=count // dtype.itemsize))  # NaN wins
        if not math.isfinite(low) or not math.isfinite(high):
            found = "NaN" if math.isnan(low) else found or "Inf"
    return found
