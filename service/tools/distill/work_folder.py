"""The work folder: what a run has written, read and trained, so that a killed one goes on where it was.

    run.json                  what the folder was made for
    texts.jsonl               a line per text, in the order in which they were finished
    lessons-00000.safetensors what both passes make of the first texts, and so on (lessons.py)
    head.safetensors          the state of the head's training, layer.safetensors of the layer's

Every file but texts.jsonl is there as a whole or not at all; of texts.jsonl the last line may be half written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from service.checkpoint import Checkpoint
from service.checkpoint.weights.tensors import file_sha256
from service.contract.errors import StartupError

_RUN = "run.json"
_TEXTS = "texts.jsonl"


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what was written after it."""

    tokens: list[int]
    prompt: int  # how many of them


class WorkFolder:
    """One run's folder, for the run's purpose only."""

    def __init__(self, path: Path, purpose: Mapping[str, str]) -> None:
        """`purpose` is everything that the results depend on, by name. Raises StartupError for a folder that holds
        results for another purpose, that is none of ours, or that cannot be written to.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
            if _RUN in names and len(names) > 1:
                self._check(json.loads((path / _RUN).read_text(encoding="utf-8")), purpose)
            elif names - {_RUN}:
                raise StartupError(
                    f"--work {path}: expected a new or an empty folder, or one of a run like this",
                    hint="name another folder",
                )
            else:
                self._replace(_RUN, (json.dumps(dict(purpose), indent=2) + "\n").encode())
        except (OSError, ValueError) as error:
            raise StartupError(f"--work {path}: {error}", hint="name another folder") from error

    def _check(self, made_for: Mapping[str, str], purpose: Mapping[str, str]) -> None:
        for name, wanted in purpose.items():
            if (found := made_for.get(name)) != wanted:
                raise StartupError(
                    f"--work {self.path}: the folder was made for other {name} ({found}) than this run's ({wanted})",
                    hint="name another folder, or delete this one",
                )

    def texts(self) -> dict[int, Text]:
        """The texts that are written, by number."""
        found = {}
        for line in self._lines():
            entry = json.loads(line)
            found[int(entry["text"])] = Text(entry["tokens"], entry["prompt"])
        return found

    def _lines(self) -> Iterator[str]:
        file = self.path / _TEXTS
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._writing():
                self._replace(_TEXTS, whole)
        yield from whole.decode().splitlines()

    def add_text(self, number: int, text: Text) -> None:
        """Keeps a text. Raises StartupError where it cannot be written."""
        line = json.dumps({"text": number, "prompt": text.prompt, "tokens": text.tokens}) + "\n"
        with self._writing(), (self.path / _TEXTS).open("a", encoding="utf-8") as file:
            file.write(line)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.path / name).exists()

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps tensors in a file. Raises StartupError where it cannot be written."""
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        with self._writing():
            self._replace(name, content)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file, mapped into memory: only what is looked at is read."""
        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        except (OSError, SafetensorError) as error:
            raise StartupError(f"{self.path / name}: {error}", hint="delete this file") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StartupError(
                f"--work {self.path}: {error}", hint="what is there stays: the same command goes on once there is room"
            ) from error

    def _replace(self, name: str, content: bytes) -> None:
        new = self.path / f".{name}.new"
        try:
            new.write_bytes(content)
            os.replace(new, self.path / name)
        except OSError:
            new.unlink(missing_ok=True)
            raise


def weights_identity(checkpoint: Checkpoint) -> str:
    """A hash over the weights that texts and lessons depend on: of all files but those of drafts."""
    digest = hashlib.sha256(repr(checkpoint.xlora).encode())
    assert checkpoint.files is not None
    for label, file in checkpoint.files.files:
        if not label.startswith("draft_head/"):
            digest.update(f"{label} {checkpoint.files.sha256.get(label) or file_sha256(file.path)}\n".encode())
    return digest.hexdigest()[:16]


def prompts_identity(prompts: object) -> str:
    """A hash over token ids."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
