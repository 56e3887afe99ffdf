"""Opening the bundle's files safely: paths that stay inside, strict JSON, pickle files named instead of read.

Knows paths and JSON, not what the files mean. Every file of a bundle is opened through one `BundleRoot`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from service.checkpoint.defects import defect, shorten

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
OUTSIDE_HINT = "copy it into the bundle, or let the operator allow outside paths"


@dataclass(frozen=True, slots=True)
class BundleRoot:
    """The bundle's folder and whether its files may lie elsewhere."""

    path: Path
    allow_outside: bool = False

    def folder(self, relative: str, source: Path, field: str) -> Path:
        """The existing folder that `field` of `source` names."""
        folder = self.path / relative
        if not folder.is_dir() and HUB_ID.fullmatch(relative) and field == "base":
            problem = f"{field}: no folder {relative!r} here, and Hugging Face hub ids are not supported yet"
            raise defect(source, problem, "download the model and give the path of its folder")
        self.require_inside(folder, source, field)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise defect(source, f"{field}: expected a folder at {str(folder)!r}, found {found}")
        return folder

    def require_inside(self, path: Path, source: Path, field: str) -> None:
        """Refuse `..`, absolute paths and symlinks that lead out of the bundle, unless allowed."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # symlink loops, NUL characters
            raise defect(source, f"{field}: cannot resolve {str(path)!r}: {error}") from error
        if not self.allow_outside and not real.is_relative_to(self.path.resolve()):
            raise defect(source, f"{field}: {str(path)!r} leads to {str(real)!r}, outside the bundle", OUTSIDE_HINT)

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

    def json(self, path: Path, hint: str | None = None) -> dict[str, Any]:
        """The object that the JSON file holds; NaN, Infinity and repeated keys are refused."""
        try:
            text = self.file(path, hint).read_text(encoding="utf-8")
            data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            problem = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            raise defect(path, problem) from error
        except (OSError, ValueError, RecursionError) as error:
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
    return data
