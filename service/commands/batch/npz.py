"""Scalings of many texts as one .npz file.

A .npz cannot be added to safely, so a run writes JSON Lines beside it, which a later run resumes from; the .npz is made
of them at the end, and takes its place at once.
"""

from __future__ import annotations

import base64
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.commands.batch.output_file import decoded
from service.contract.errors import StartupError

_KINDS = ("scalings", "entropy", "start", "token_ids")  # of each text, as KIND/ID
_NAMES = ("experts", "sites")  # of all texts, and as NAME/ID of one that has others
_Array = npt.NDArray[Any]


def part_of(path: Path) -> Path:
    """The file of JSON Lines that belongs to a .npz file."""
    return path.with_name(path.name + ".part.jsonl")


def ids_in(path: Path) -> frozenset[str]:
    """The texts that a .npz file has. Raises StartupError for one that this command has not written."""
    if not path.exists():
        return frozenset()
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise StartupError(f"{path} is not a .npz file: {error}", hint="choose another --output") from None
    prefix = f"{_KINDS[0]}/"
    return frozenset(name.removeprefix(prefix).removesuffix(".npy") for name in names if name.startswith(prefix))


def finish(path: Path, *, keep_part: bool) -> None:
    """Adds what the lines beside it bring to a .npz file, which is written anew; `keep_part` where some have failed."""
    part, new = part_of(path), path.with_name(path.name + ".new")
    if part.stat().st_size:
        with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            names = _copy(path, archive)
            old = ids_in(path)
            for document in _documents(part):
                if str(document["id"]) not in old:
                    _add(archive, document, names)
        os.replace(new, path)
    if not keep_part:
        part.unlink()


def _copy(path: Path, archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Copies what is there already; returns its names of experts and sites, empty where there is nothing."""
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as before:
        for name in before.namelist():
            archive.writestr(name, before.read(name))
    with np.load(path) as arrays:
        return {name: arrays[name].tolist() for name in _NAMES if name in arrays}


def _add(archive: zipfile.ZipFile, document: dict[str, Any], names: dict[str, list[str]]) -> None:
    """One text's arrays; `names` are those of the first text, and others have their own."""
    for name in _NAMES:
        own = document["scalings"][name]
        if name not in names:
            names[name] = own
            _write(archive, name, np.array(own))
        elif own != names[name]:
            _write(archive, f"{name}/{document['id']}", np.array(own))
    for kind, array in zip(_KINDS, _arrays(document), strict=True):
        _write(archive, f"{kind}/{document['id']}", array)


def _documents(part: Path) -> Iterator[dict[str, Any]]:
    with part.open("rb") as lines:
        for line in lines:
            document = decoded(line)
            if "error" not in document:
                yield document


def _arrays(document: dict[str, Any]) -> Iterator[_Array]:
    """The arrays of _KINDS: [T, E] or [T, S, E]; [T]; a number; [T]."""
    rows = document["scalings"]
    if "full" in rows:
        yield np.load(io.BytesIO(base64.b64decode(rows["full"])))
    else:
        yield np.array(rows["mean"], np.float32)
    yield np.array(rows["entropy"], np.float32)  # null is NaN
    yield np.array(rows["start"])
    yield np.array([token["id"] for token in document["tokens"]], np.int64)


def _write(archive: zipfile.ZipFile, name: str, array: _Array) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
