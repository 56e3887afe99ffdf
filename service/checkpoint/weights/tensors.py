"""Reading safetensors: headers with exact errors, single tensors, and one pass that hashes and looks for NaN and Inf.
The hashes are compared with bundle.json and combined into one.

Knows the file format, not what the tensors are for. Never holds more than one tensor or one buffer in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.files import BundleRoot

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAME = 1000  # characters of a tensor's name
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BUFFER_BYTES = 1 << 20  # fits a core's cache, so that the second look at the bytes is nearly free


class TensorInfo(NamedTuple):
    """One header entry; `start` and `end` are byte offsets into the file's data section. A tuple, for there may be many
    of them.
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


def scan(file: TensorFile, defects: Defects) -> str:
    """Hash the file and report every tensor with NaN or Inf, in one pass over the bytes; returns the SHA-256."""
    digest = hashlib.sha256()
    buffer = bytearray(BUFFER_BYTES)
    with file.path.open("rb") as handle:
        digest.update(handle.read(file.data_start))
        for _, group in itertools.groupby(file.tensors.values(), key=lambda info: info.dtype):
            run = list(group)  # neighbours of one dtype are looked at as one: a file may have very many tensors
            if _scan_tensor(handle, run[0]._replace(end=run[-1].end), buffer, digest):
                _name_damaged(file, run, buffer, defects)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_damaged(file: TensorFile, run: list[TensorInfo], buffer: bytearray, defects: Defects) -> None:
    """Looks at each tensor of a run that holds NaN or Inf."""
    with file.path.open("rb") as handle:
        handle.seek(file.data_start + run[0].start)
        for info in run:
            found = _scan_tensor(handle, info, buffer, hashlib.sha256())
            if found:
                problem = f"tensor {info.name!r}: expected finite values, found {found}"
                defects.add(defect(file.path, problem, "the weights are damaged or training diverged"))


def read_tensors(file: TensorFile) -> dict[str, torch.Tensor]:
    """Every tensor of the file, on the CPU, in its own dtype."""
    return dict(iterate_tensors(file, file.tensors))


def iterate_tensors(file: TensorFile, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """These tensors of the file one after the other, on the CPU, in their own dtype."""
    try:
        with safe_open(file.path, framework="pt") as opened:
            for name in names:
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise defect(file.path, f"corrupt safetensors: {error}") from error


class StoredTensor:
    """A tensor of a file, read when it is asked for: `stored[...]`, as safetensors' own slices are.

    It is read into memory of its own and not mapped, so a process holds what it has asked for and nothing of the file.
    """

    def __init__(self, file: TensorFile, info: TensorInfo) -> None:
        self._path, self._start, self._info = file.path, file.data_start + info.start, info

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return DTYPES[self._info.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Raises CheckpointError where the file has become shorter."""
        tensor = torch.empty(self._info.shape, dtype=self.dtype)
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise defect(self._path, f"truncated: tensor {self._info.name!r} lies beyond the end")
                view = view[count:]
        return tensor[index]


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
    """Feed the bytes of one tensor, or of a run of them, to `digest`; "NaN" or "Inf" when there is one."""
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


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file: `label` is its place in the standard layout, wherever it really lies."""

    label: str
    size_bytes: int
    sha256: str
    verified: bool  # compared with bundle.json just now


class WeightHasher:
    """Hashes and checks each weight file once, and compares it with bundle.json."""

    def __init__(
        self,
        root: BundleRoot,
        sha256: Mapping[str, str],  # by file, as `source` has them
        source: Path,
        defects: Defects,
        verify: bool,
        on_progress: Callable[[str], None],
    ) -> None:
        self.root, self.sha256, self.source, self.defects, self.verify = root, sha256, source, defects, verify
        self.on_progress = on_progress
        self.files: list[WeightFile] = []
        self.pending: list[tuple[str, TensorFile, bool]] = []
        self.recorded = {(root.path / name).resolve(): name for name in sha256}
        self.unmet = set(sha256)

    def add(self, label: str, file: TensorFile, *, trust_recorded: bool = False) -> None:
        """Notes one file to be scanned; with `trust_recorded` and verification off, a recorded hash replaces that."""
        self.pending.append((label, file, trust_recorded))

    def run(self) -> None:
        """Scans the files, last of all: what is wrong without their values is known by then, however large they are."""
        for label, file, trust_recorded in self.pending:
            self._scan(label, file, trust_recorded)
        self._check_remaining()

    def _scan(self, label: str, file: TensorFile, trust_recorded: bool) -> None:
        name = self.recorded.get(file.path.resolve(), "")
        self.unmet.discard(name)
        expected = self.sha256.get(name)
        if expected and trust_recorded and not self.verify:
            self.files.append(WeightFile(label, file.size_bytes, expected, verified=False))
            return
        self.on_progress(f"checking {label} ({file.size_bytes / 1e6:,.1f} MB)")
        found = scan(file, self.defects)
        if expected and self.verify:
            self._compare(file.path, expected, found)
        self.files.append(WeightFile(label, file.size_bytes, found, verified=bool(expected and self.verify)))

    def _check_remaining(self) -> None:
        """Files that bundle.json has a hash for and that no part of the bundle uses."""
        for name in sorted(self.unmet):
            path = self.root.path / name
            with self.defects.guard():
                self.root.require_inside(path, self.source, f"sha256[{name!r}]")
                if not path.is_file():
                    raise defect(self.source, f"sha256[{name!r}]: expected a file there, found nothing")
                if self.verify:
                    self._compare(path, self.sha256[name], file_sha256(path))

    def combined(self) -> str:
        """One hash over all weight files' hashes, sorted by label."""
        lines = sorted(f"{file.label} {file.sha256}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _compare(self, path: Path, expected: str, found: str) -> None:
        if found != expected:
            hint = "the file changed after the bundle was written; restore it or write the bundle again"
            self.defects.add(defect(path, f"sha256: expected {expected}, found {found}", hint))
