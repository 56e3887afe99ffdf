"""Hugging Face hub ids -> folders, through huggingface_hub: its cache, its token, its offline mode.

Knows `owner/name` and `owner/name@revision`, and which files a model can need. Reads none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# Pickles are never read; `consolidated` and `original` are second copies of the same weights.
WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["consolidated*", "original/*", "onnx/*"]
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def is_hub_id(text: str) -> bool:
    """Whether `text` has the shape of a hub id; a relative path of two parts has it too, so look there first."""
    return HUB_ID.fullmatch(text) is not None


def same_repository(first: str, second: str) -> bool:
    """Whether two hub ids name one repository, whatever the revisions; the hub ignores case."""
    return first.partition("@")[0].lower() == second.partition("@")[0].lower()


def snapshot(hub_id: str, where: str, hint: str, on_progress: Callable[[str], None]) -> Path:
    """The folder in huggingface_hub's cache that holds `hub_id`, downloaded where it is not there yet.

    `where` is the file and field, or the flag, that named it. Raises CheckpointError when it cannot be had.
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
    except Exception as error:  # huggingface_hub passes on whatever its HTTP library of the day raises
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
