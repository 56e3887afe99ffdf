"""The weight files of a checkpoint, their hashes, and one hash over all of them.

bundle.json may state a file's SHA-256. `check` compares and looks at every value at once; the server compares while the
model is loaded from the same files, and computes what nobody has stated when it serves already.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile, file_sha256, scan
from service.contract.errors import CheckpointError

logger = logging.getLogger(__name__)

MAX_THREADS = 4  # that read and hash at once: more than a disk gives
LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file: `label` is its place in the standard layout, wherever it really lies."""

    label: str
    size_bytes: int
    sha256: str
    verified: bool  # compared with bundle.json just now


class WeightFiles:
    """The weight files in the order in which the checkpoint's parts are read, and what bundle.json says of them."""

    def __init__(self, root: BundleRoot, sha256: Mapping[str, str], source: Path) -> None:
        """`sha256` by file, as `source` has them."""
        self.root, self.sha256, self.source = root, sha256, source
        self.files: list[tuple[str, TensorFile]] = []
        self._stated = {(root.path / name).resolve(): name for name in sha256}

    def add(self, label: str, file: TensorFile) -> None:
        """Adds a file whose header has been read."""
        self.files.append((label, file))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over labels, sizes and headers, which are known without reading weights."""
        lines = [f"{label} {file.size_bytes} {tuple(file.tensors.values())}\n" for label, file in self.files]
        return _sha256_of(lines)

    @property
    def stated(self) -> str | None:
        """The hash over all weight files, by the hashes in bundle.json; None if some are missing there."""
        hashes = [self._stated_hash(file) for _, file in self.files]
        return None if None in hashes else self._combined([value or "" for value in hashes])

    def examine(self, defects: Defects, on_progress: Callable[[str], None]) -> list[WeightFile]:
        """Hashes every file and checks every value, several files at once."""
        found = []
        with _threads() as pool, _dropped(pool):
            scans = [pool.submit(scan, file) for _, file in self.files]
            for (label, file), result in zip(self.files, scans, strict=True):
                on_progress(f"checking {label} ({file.size_bytes / 1e6:,.1f} MB)")
                sha256, errors = result.result()
                for error in errors:
                    defects.add(error)
                expected = self._stated_hash(file)
                if expected is not None and expected != sha256:
                    defects.add(_mismatch(file.path, expected, sha256))
                found.append(WeightFile(label, file.size_bytes, sha256, verified=expected is not None))
            for path, expected in self._unused(defects):
                if expected != (sha256 := file_sha256(path)):
                    defects.add(_mismatch(path, expected, sha256))
        return found

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Hashes the files in other threads while the block reads them, so that the disk is read once. Raises
        CheckpointError at the end of the block for a file whose hash differs from bundle.json's.
        """
        defects = Defects()
        stated = {file.path: self._stated_hash(file) for _, file in self.files}
        expected = {path: sha256 for path, sha256 in stated.items() if sha256 is not None}
        expected |= dict(self._unused(defects))
        stop = threading.Event()
        with _threads() as pool, _dropped(pool, stop):
            found = {path: pool.submit(file_sha256, path, stop) for path in expected}
            yield
            for path, sha256 in expected.items():
                if sha256 != (actual := found[path].result()):
                    raise _mismatch(path, sha256, actual)

    def hash_weights(self, on_known: Callable[[str], None]) -> None:
        """Computes the hash over all weight files in a thread of the lowest priority, which then calls `on_known`. If a
        file cannot be read any more, the hash stays unknown.
        """

        def compute() -> None:
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
                hashes = [self._stated_hash(file) or file_sha256(file.path) for _, file in self.files]
            except (OSError, CheckpointError) as error:
                logger.warning("the hash over all weights stays unknown: %s", error)
            else:
                on_known(self._combined(hashes))

        threading.Thread(target=compute, name="hash of the weights", daemon=True).start()

    def combined(self, files: Sequence[WeightFile]) -> str:
        """The hash over all weight files, by the results of `examine`."""
        return self._combined([file.sha256 for file in files])

    def _combined(self, hashes: Sequence[str]) -> str:
        return _sha256_of([f"{label} {sha256}\n" for (label, _), sha256 in zip(self.files, hashes, strict=True)])

    def _stated_hash(self, file: TensorFile) -> str | None:
        return self.sha256.get(self._stated.get(file.path.resolve(), ""))

    def _unused(self, defects: Defects) -> Iterator[tuple[Path, str]]:
        """Files with a hash in bundle.json that no part of the bundle uses, each with that hash."""
        used = {file.path.resolve() for _, file in self.files}
        for place, name in sorted(self._stated.items(), key=lambda item: item[1]):
            if place in used:
                continue
            with defects.guard():
                path = self.root.path / name
                self.root.require_inside(path, self.source, f"sha256[{name!r}]")
                if not path.is_file():
                    raise defect(self.source, f"sha256[{name!r}]: expected a file there, found nothing")
                yield path, self.sha256[name]


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="hashing")


@contextmanager
def _dropped(pool: ThreadPoolExecutor, stop: threading.Event | None = None) -> Iterator[None]:
    """Cancels pending work at the end, so that an error is raised at once, and not after gigabytes have been hashed."""
    try:
        yield
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _sha256_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _mismatch(path: Path, expected: str, found: str) -> CheckpointError:
    hint = "the file changed after the bundle was written; restore it or write the bundle again"
    return defect(path, f"sha256: expected {expected}, found {found}", hint)
