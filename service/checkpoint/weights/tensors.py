"""Reads safetensors: headers with exact errors, tensors when they are indexed, and whole files in one pass that hashes
them and finds NaN and Inf.

Knows the file format, not the meaning of tensors. Never holds more than one tensor or one buffer in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from service.checkpoint.defects import defect
from service.contract.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAME = 1000  # characters of a tensor's name
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BUFFER_BYTES = 1 << 20  # fits a core's cache, so that reading the bytes a second time is nearly free


class TensorInfo(NamedTuple):
    """One header entry; `start` and `end` are byte offsets into the file's data section. A tuple, because a file may
    have very many.
    """

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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an OSError into a defect of the file."""
    try:
        yield
    except OSError as error:
        raise defect(path, f"not readable: {error.strerror or error}") from error


def scan(file: TensorFile) -> tuple[str, list[CheckpointError]]:
    """The SHA-256 of the file, and an error for every tensor with NaN or Inf, in one pass over the bytes."""
    digest = hashlib.sha256()
    buffer = bytearray(BUFFER_BYTES)
    errors: list[CheckpointError] = []
    with readable(file.path), file.path.open("rb") as handle:
        digest.update(handle.read(file.data_start))
        for _, group in itertools.groupby(file.tensors.values(), key=lambda info: info.dtype):
            run = list(group)  # neighbours of one dtype are scanned together, because a file may have very many tensors
            if _scan_tensor(handle, run[0]._replace(end=run[-1].end), buffer, digest):
                errors += _damaged(file, run, buffer)
    return digest.hexdigest(), errors


def file_sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Hexadecimal SHA-256 of a file of any size; of its beginning where `stop` was set in the meantime."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
    with readable(path), path.open("rb", buffering=0) as file:
        while (stop is None or not stop.is_set()) and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _damaged(file: TensorFile, run: list[TensorInfo], buffer: bytearray) -> Iterator[CheckpointError]:
    """Scans the tensors of a run with NaN or Inf one by one."""
    with file.path.open("rb") as handle:
        handle.seek(file.data_start + run[0].start)
        for info in run:
            if found := _scan_tensor(handle, info, buffer, hashlib.sha256()):
                yield _not_finite(file.path, info, found)


def _not_finite(path: Path, info: TensorInfo, found: str) -> CheckpointError:
    problem = f"tensor {info.name!r}: expected finite values, found {found}"
    return defect(path, problem, "the weights are damaged or training diverged")


class StoredTensor:
    """A tensor of a file that is read when it is indexed: `stored[...]`, like safetensors' own slices.

    It is read and not mapped, so a process only holds the tensors that it has indexed. Values are checked while they
    are read: NaN and Inf raise CheckpointError, and so does a file that has become shorter.
    """

    def __init__(self, file: TensorFile, info: TensorInfo) -> None:
        self._path, self._start, self._info = file.path, file.data_start + info.start, info

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return DTYPES[self._info.dtype]

    @property
    def shape(self) -> torch.Size:
        """The shape in the file."""
        return torch.Size(self._info.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._info.end - self._info.start

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Reads the whole tensor, whatever the index."""
        tensor = torch.empty(self._info.shape, dtype=self.dtype)
        values = tensor.view(-1)
        view, first, found = memoryview(values.view(torch.uint8).numpy().data), 0, None
        with readable(self._path), self._path.open("rb", buffering=0) as file:
            file.seek(self._start)
            while first < len(view):
                count = file.readinto(view[first : first + BUFFER_BYTES])
                if not count:
                    raise defect(self._path, f"truncated: tensor {self._info.name!r} lies beyond the end")
                item = self.dtype.itemsize
                found = _worse(found, values[first // item : (first + count) // item])
                first += count
        if found:
            raise _not_finite(self._path, self._info, found)
        return tensor[index]


def read_tensors(file: TensorFile, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """These tensors of the file, or all, on the CPU and in their own dtype."""
    wanted = file.tensors if names is None else names
    return {name: StoredTensor(file, file.tensors[name])[...] for name in wanted}


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise defect(path, f"tensor {name!r:.80}: expected a name of at most {MAX_NAME} characters, found {len(name)}")
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
    """Refuses holes, overlaps and extra bytes, with which one tensor could contain the bytes of another."""
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
    """Feeds the bytes of one tensor, or of a run of them, to `digest`. Returns "NaN" or "Inf" when there is one."""
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
        found = _worse(found, torch.frombuffer(buffer, dtype=dtype, count=count // dtype.itemsize))
    return found


def _worse(found: str | None, values: torch.Tensor) -> str | None:
    """ "NaN" or "Inf" when they are among the values, NaN before what was `found` before them."""
    if not len(values):
        return found
    low, high = torch.aminmax(values)  # NaN wins
    if math.isfinite(low) and math.isfinite(high):
        return found
    return "NaN" if math.isnan(low) else found or "Inf"
