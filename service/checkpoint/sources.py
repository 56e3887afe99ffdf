"""Locates the parts of a checkpoint: by its files, unless the operator overrides them. Hub ids become folders through
huggingface_hub, with its cache, its token, and its offline mode.

Knows the operator's overrides, and distinguishes paths inside the checkpoint, hub ids, and the operator's own paths.
Reads no part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from service.checkpoint.defects import defect
from service.checkpoint.weights.files import BundleRoot
from service.contract.errors import SettingsError

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# Pickles are never read; `consolidated` and `original` are second copies of the same weights.
WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["consolidated*", "original/*", "onnx/*"]
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id. A relative path of two parts has it, too: check for a folder first."""
    return HUB_ID.fullmatch(text) is not None


def same_repository(first: str, second: str) -> bool:
    """Whether two hub ids name one repository, in any revision; the hub ignores case."""
    return first.partition("@")[0].lower() == second.partition("@")[0].lower()


def snapshot(hub_id: str, where: str, hint: str, on_progress: Callable[[str], None]) -> Path:
    """The folder of `hub_id` in huggingface_hub's cache, downloaded if needed.

    `where` is the file and field, or the flag, that named it. Raises CheckpointError when it is not available.
    """
    match = HUB_ID.fullmatch(hub_id)
    assert match is not None
    problem = f"no folder {hub_id!r} here, and as a hub id"
    try:
        folder = snapshot_download(
            match["repository"],
            revision=match["revision"],
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            tqdm_class=_reporter(hub_id, on_progress),
            local_files_only=constants.HF_HUB_OFFLINE,  # or 1.33 would ask for the files of a pinned commit
        )
    except GatedRepoError as error:
        raise defect(where, f"{problem} it is gated", LOG_IN) from error
    except RevisionNotFoundError as error:
        raise defect(where, f"{problem} it has no such revision", hint) from error
    except RepositoryNotFoundError as error:
        raise defect(where, f"{problem} it does not exist, or not for your token", f"{hint}; {LOG_IN}") from error
    except LocalEntryNotFoundError as error:
        unreachable = "it is not in the local cache, and the hub cannot be reached or is switched off"
        raise defect(where, f"{problem} {unreachable}", hint) from error
    except Exception as error:  # huggingface_hub passes on any exception of its HTTP library
        raise defect(where, f"{problem} it could not be downloaded: {error}", hint) from error
    return Path(folder)


def _reporter(hub_id: str, on_progress: Callable[[str], None]) -> Any:
    """A progress bar that draws nothing and reports every whole percent of the bytes as a line."""

    class Reporter(tqdm):  # type: ignore[misc]
        reported = -1

        def display(self, *_: Any, **__: Any) -> None:
            percent = int(100 * self.n / self.total) if self.total and self.unit == "B" else -1
            if percent > self.reported:
                self.reported = percent
                on_progress(f"downloading {hub_id}: {percent} % of {self.total / 1e6:,.0f} MB")

    return Reporter


@dataclass(frozen=True, slots=True)
class Overrides:
    """The operator's overrides of a checkpoint's files."""

    base: str | None = None  # --base: a folder or a hub id
    experts: Mapping[str, str] = field(default_factory=dict)  # --expert name=path: folders or hub ids
    ordering: Path | None = None  # --ordering: mistral.rs's JSON, the order of experts and sites
    gate_relu: bool | None = None  # --gate-relu: whether the classifier has ReLU between its layers
    eos_from_tokenizer: bool = False  # --eos-from-tokenizer: the tokenizer's eos token ends texts too
    rescue: bool = False  # convert --rescue: undo damage where the files still allow it

    @classmethod
    def parse(
        cls,
        base: str | None,
        experts: Sequence[str],
        ordering: str | None,
        gate_relu: bool | None = None,
        eos_from_tokenizer: bool = False,
    ) -> Overrides:
        """The overrides of the flags' text. Raises SettingsError for an --expert that is not name=path."""
        places: dict[str, str] = {}
        for text in experts:
            name, equals, place = text.partition("=")
            if not (name and equals and place) or name in places:
                problem = "given twice" if name in places else "expected name=path"
                raise SettingsError(f"--expert {text!r}: {problem}", hint="for example --expert math=/models/math")
            places[name] = place
        return cls(base, places, Path(ordering) if ordering else None, gate_relu, eos_from_tokenizer)


class Locator:
    """Resolves the names of folders, inside of `root`, or outside where that is allowed."""

    def __init__(self, root: BundleRoot, overrides: Overrides, on_progress: Callable[[str], None]) -> None:
        self.root, self.overrides, self.on_progress = root, overrides, on_progress

    def base(self, text: str | None, source: Path) -> tuple[Path, str]:
        """The base's folder, and its reference for others: a hub id or an absolute path.

        `text` is the name in `source`, None if it has none.
        """
        if self.overrides.base is not None:
            folder, text = self._given(self.overrides.base, "--base"), self.overrides.base
            return folder, str(folder.resolve()) if Path(text).is_dir() else text
        if text is None:
            raise defect(source, "base: the file does not name one", "say where it is with --base")
        folder = self._stated(text, source, "base", "say where it is with --base")
        return folder, str(folder.resolve()) if (self.root.path / text).is_dir() else text

    def expert(self, name: str, text: str, source: Path) -> Path:
        """The folder of one expert's adapter."""
        if name in self.overrides.experts:
            return self._given(self.overrides.experts[name], f"--expert {name}")
        hint = f"say where it is with --expert {name}=PATH"
        return self._stated(text, source, f"expert {name!r}", hint)

    def check_names(self, names: Sequence[str], source: Path) -> None:
        """Refuses an --expert for an expert that the checkpoint does not have."""
        for name in self.overrides.experts:
            if name not in names:
                raise defect(source, f"--expert {name}: no such expert", f"it has {', '.join(names)}")

    def _given(self, text: str, flag: str) -> Path:
        """A folder that the operator named: anywhere, relative to the working directory."""
        folder = Path(text)
        if not folder.is_dir():
            if not is_hub_id(text):
                raise defect(flag, f"expected a folder or a hub id, found {text!r}")
            folder = snapshot(text, flag, "give a folder", self.on_progress)
        self.root.trust(folder)
        return folder

    def _stated(self, text: str, source: Path, field_name: str, hint: str) -> Path:
        """A folder that a file names: inside the checkpoint, or a hub id, or anywhere if that is allowed."""
        if not (self.root.path / text).is_dir() and is_hub_id(text):
            folder = snapshot(text, f"{source}: {field_name}", hint, self.on_progress)
            self.root.trust(folder)
            return folder
        return self.root.folder(text, source, field_name, hint)


def locate_model(model: str | Path, on_progress: Callable[[str], None]) -> Path:
    """The folder of the whole checkpoint: `model` itself, or a hub repository."""
    if not Path(model).exists() and is_hub_id(str(model)):
        return snapshot(str(model), "--model", "give a folder or owner/name[@revision]", on_progress)
    return Path(model)
