"""Where the parts of a checkpoint lie: what its files say, unless the operator says otherwise.

Knows the operator's overrides and the difference between a path inside the checkpoint, a hub id, and a path that the
operator gave. Reads no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from service.checkpoint.defects import defect
from service.checkpoint.hub import is_hub_id, snapshot
from service.checkpoint.weights.files import BundleRoot
from service.contract.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the operator says about a checkpoint, which then wins over its files."""

    base: str | None = None  # --base: a folder or a hub id
    experts: Mapping[str, str] = field(default_factory=dict)  # --expert name=path: folders or hub ids
    ordering: Path | None = None  # --ordering: mistral.rs's JSON, the order of experts and sites
    gate_relu: bool | None = None  # --gate-relu: whether the classifier has ReLU between its layers
    rescue: bool = False  # convert --rescue: undo damage where the files still allow it

    @classmethod
    def parse(
        cls, base: str | None, experts: Sequence[str], ordering: str | None, gate_relu: bool | None = None
    ) -> Overrides:
        """From the flags' text. Raises SettingsError for an --expert that is not name=path."""
        places: dict[str, str] = {}
        for text in experts:
            name, equals, place = text.partition("=")
            if not (name and equals and place) or name in places:
                problem = "given twice" if name in places else "expected name=path"
                raise SettingsError(f"--expert {text!r}: {problem}", hint="for example --expert math=/models/math")
            places[name] = place
        return cls(base, places, Path(ordering) if ordering else None, gate_relu)


class Locator:
    """Turns the texts that name folders into folders of `root`, or beside it where that is allowed."""

    def __init__(self, root: BundleRoot, overrides: Overrides, on_progress: Callable[[str], None]) -> None:
        self.root, self.overrides, self.on_progress = root, overrides, on_progress

    def base(self, text: str | None, source: Path) -> tuple[Path, str]:
        """The base's folder, and where that is for others: its hub id or absolute path.

        `text` is what `source` says, None when it says nothing.
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
        """Refuses an --expert for an expert that the checkpoint has not."""
        for name in self.overrides.experts:
            if name not in names:
                raise defect(source, f"--expert {name}: no such expert", f"it has {', '.join(names)}")

    def _given(self, text: str, flag: str) -> Path:
        """A place that the operator gave: anywhere, relative to the working directory."""
        folder = Path(text)
        if not folder.is_dir():
            if not is_hub_id(text):
                raise defect(flag, f"expected a folder or a hub id, found {text!r}")
            folder = snapshot(text, flag, "give a folder", self.on_progress)
        self.root.trust(folder)
        return folder

    def _stated(self, text: str, source: Path, field_name: str, hint: str) -> Path:
        """A place that a file names: inside the checkpoint, or a hub id, or anywhere where that is allowed."""
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
