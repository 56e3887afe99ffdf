"""Opens the bundle's files safely: paths stay inside, JSON is strict, pickle files are refused by name.

Knows paths and JSON, not the meaning of files. Every file of a bundle is opened through one `BundleRoot`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from service.checkpoint.defects import defect, shorten

MAX_TEXT_BYTES = 100_000_000  # of a JSON file or a template; the largest tokenizers have 40 MB
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
OUTSIDE_HINT = "copy it into the bundle, or let the operator allow outside paths (--allow-outside)"


@dataclass(frozen=True, slots=True)
class BundleRoot:
    """The bundle's folder and whether its files may lie elsewhere."""

    path: Path
    allow_outside: bool = False
    trusted: list[Path] = field(default_factory=list)  # resolved: places that the operator or the hub's cache gave

    def __post_init__(self) -> None:
        self.trust(self.path)

    @property
    def name(self) -> str:
        """The name of the checkpoint: its folder's, or the repository's for a snapshot in the hub's cache."""
        path = self.path.resolve()
        in_cache = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
        return path.parent.parent.name.rpartition("--")[2] if in_cache else path.name

    def trust(self, folder: Path) -> None:
        """Allows files in `folder`; for a snapshot in the hub's cache, also the blobs that it links to."""
        try:
            in_cache = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
            self.trusted.append((folder.parent.parent if in_cache else folder).resolve())
        except (OSError, RuntimeError, ValueError) as error:
            raise defect(folder, f"cannot resolve: {error}") from error

    def folder(self, relative: str, source: Path, field_name: str, hint: str | None = None) -> Path:
        """The existing folder that `field_name` of `source` names; `hint` is for the error when there is none."""
        folder = self.path / relative
        self.require_inside(folder, source, field_name, hint)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise defect(source, f"{field_name}: expected a folder at {str(folder)!r}, found {found}", hint)
        return folder

    def holds(self, path: Path) -> bool:
        """Whether `path` leads to an allowed place. Raises OSError or RuntimeError for a loop of links."""
        real = path.resolve()
        return self.allow_outside or any(real.is_relative_to(folder) for folder in self.trusted)

    def require_inside(self, path: Path, source: Path, field_name: str, hint: str | None = None) -> None:
        """Refuse `..`, absolute paths and symlinks that lead out of the bundle, unless allowed."""
        try:
            is_inside = self.holds(path)
        except (OSError, RuntimeError, ValueError) as error:  # symlink loops, NUL characters
            raise defect(source, f"{field_name}: cannot resolve {str(path)!r}: {error}") from error
        if not is_inside:
            problem = f"{field_name}: {str(path)!r} leads to {str(path.resolve())!r}, outside the bundle"
            raise defect(source, problem, "; or ".join(filter(None, [OUTSIDE_HINT, hint])))

    def file(self, path: Path, hint: str | None = None) -> Path:
        """`path` itself when it is a regular file inside the bundle."""
        self.require_inside(path, path, "path")
        if not path.is_file():
            raise defect(path, "expected a file, found " + ("a folder" if path.is_dir() else "nothing"), hint)
        return path

    def weights(self, folder: Path, name: str) -> Path:
        """The safetensors file `name` of `folder`; in its absence pickle files are named, never opened."""
        if not (folder / name).exists():
            refuse_pickles(folder, name)
        return self.file(folder / name)

    def require_links_inside(self, folder: Path) -> None:
        """Refuse symlinks in `folder` that lead out of the bundle: libraries open files there by themselves."""
        for entry in sorted(folder.iterdir()):
            if entry.is_symlink():
                self.require_inside(entry, entry, "path")

    def text(self, path: Path, hint: str | None = None) -> str:
        """The text of a UTF-8 file; other encodings and byte order marks, which other readers refuse, are refused."""
        size = self.file(path, hint).stat().st_size
        if size > MAX_TEXT_BYTES:
            raise defect(path, f"expected at most {MAX_TEXT_BYTES:,} bytes, found {size:,}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise defect(path, f"not readable as UTF-8: {error}", "save it as UTF-8") from error
        if text.startswith("\ufeff"):
            raise defect(path, "expected plain UTF-8, found a byte order mark", "save it as UTF-8 without BOM")
        return text

    def json(self, path: Path, hint: str | None = None) -> dict[str, Any]:
        """The object that the JSON file holds; NaN, Infinity, numbers beyond a float and repeated keys are refused."""
        text = self.text(path, hint)
        try:
            data = json.loads(
                text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys
            )
        except json.JSONDecodeError as error:
            problem = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            raise defect(path, problem) from error
        except (ValueError, RecursionError) as error:
            raise defect(path, f"not readable as JSON: {error}") from error
        if not isinstance(data, dict):
            raise defect(path, f"expected a JSON object, found {type(data).__name__}")
        return data


def refuse_pickles(folder: Path, wanted: str) -> None:
    """Raise when `folder` holds pickle files; called where safetensors were expected and are absent."""
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        problem = f"expected safetensors, found pickle files {shorten(pickles)}, which can run code and are refused"
        raise defect(folder / wanted, problem, "convert them with safetensors and delete the originals")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is beyond the range of numbers")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"repeated key {next(key for key, count in counts.items() if count > 1)!r:.80}")
    return data
