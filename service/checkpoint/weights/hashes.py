"""SHA-256 of the weight files: computed once, compared with bundle.json, combined into one.

Knows hashes only; the pass over the bytes, which also looks for NaN and Inf, is tensors.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.checkpoint.defects import Defects, defect
from service.checkpoint.formats.manifest import Manifest
from service.checkpoint.formats.writer import file_sha256
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile, scan


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
        self, root: BundleRoot, manifest: Manifest, defects: Defects, verify: bool, on_progress: Callable[[str], None]
    ) -> None:
        self.root, self.manifest, self.defects, self.verify = root, manifest, defects, verify
        self.on_progress = on_progress
        self.files: list[WeightFile] = []
        self.pending: list[tuple[str, TensorFile, bool]] = []
        self.recorded = {(root.path / name).resolve(): name for name in manifest.sha256}
        self.unmet = set(manifest.sha256)

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
        expected = self.manifest.sha256.get(name)
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
                self.root.require_inside(path, self.manifest.source, f"sha256[{name!r}]")
                if not path.is_file():
                    raise defect(self.manifest.source, f"sha256[{name!r}]: expected a file there, found nothing")
                if self.verify:
                    self._compare(path, self.manifest.sha256[name], file_sha256(path))

    def combined(self) -> str:
        """One hash over all weight files' hashes, sorted by label."""
        lines = sorted(f"{file.label} {file.sha256}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _compare(self, path: Path, expected: str, found: str) -> None:
        if found != expected:
            hint = "the file changed after the bundle was written; restore it or write the bundle again"
            self.defects.add(defect(path, f"sha256: expected {expected}, found {found}", hint))
