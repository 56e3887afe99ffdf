"""The values of fields that a request leaves out: the operator's, and generation_config.json's where they ask for it.

Knows files and settings; what a value may be is checked as in a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.api.schemas.fields import OneTextFields
from service.contract.engine_info import EngineInfo
from service.contract.errors import StartupError
from service.settings import Settings

GENERATION_FILE = "generation_config.json"
# Fields of generation_config.json that say how a token is drawn. Where do_sample is false none of them counts but
# repetition_penalty: transformers then takes the best token.
_DRAWING = ("temperature", "top_p", "top_k", "min_p")
_NAMES = {"max_tokens": "max_new_tokens"}  # of requests, and of the file
_ALWAYS = ("repetition_penalty",)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The values of absent fields, where they are not those of SamplingParams."""

    max_tokens: int | None = None  # None: what the context leaves
    fields: Mapping[str, Any] = field(default_factory=dict)  # by their names in SamplingParams

    @classmethod
    def of(cls, settings: Settings, info: EngineInfo) -> SamplingDefaults:
        """Raises StartupError for a generation_config.json with values that no request may have."""
        fields: dict[str, Any] = {}
        if settings.generation_config == "auto":
            fields = _read(Path(info.tokenizer_path).parent / GENERATION_FILE)
        stated = fields.pop("max_tokens", None)
        return cls(stated if settings.default_max_tokens is None else settings.default_max_tokens, fields)


def _read(path: Path) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    names = _ALWAYS if stated.get("do_sample") is False else (*_ALWAYS, *_DRAWING)
    fields = {name: stated[name] for name in names if stated.get(name) is not None}
    if stated.get("do_sample") is False:
        fields["temperature"] = 0.0
    for name, theirs in _NAMES.items():
        if stated.get(theirs) is not None:
            fields[name] = stated[theirs]
    try:
        checked = OneTextFields.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise StartupError(
            f"{path}: {_NAMES.get(name, name)} is {first['input']!r}: {first['msg'].lower()}",
            hint="correct the file, or leave --generation-config out",
        ) from None
    return checked.model_dump(include=set(fields), exclude_none=True)
