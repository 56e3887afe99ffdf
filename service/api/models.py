"""The names a request may give as `model`. Virtual models (the base alone, one expert) will be more entries here.

This file knows names; what a name means to the engine is a field of Virtual when steering is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.request import EngineInfo
from service.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Virtual:
    """One name."""

    id: str


def available(info: EngineInfo) -> list[Virtual]:
    """Every name this server answers to."""
    return [Virtual(info.model)]


def resolve(name: str | None, info: EngineInfo) -> Virtual:
    """What a request's `model` means; the mixture when absent. Raises NotFoundError for other names."""
    known = {virtual.id: virtual for virtual in available(info)}
    if name is None:
        return known[info.model]
    if name not in known:
        raise NotFoundError(
            f"there is no model {name[:100]!r} here",
            param="model",
            code="model_not_found",
            hint=f"one of: {', '.join(known)}",
        )
    return known[name]
