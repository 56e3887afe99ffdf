"""The names a request may give as `model`: the mixture, its base alone, and each expert alone, always with weight 1."""

from __future__ import annotations

from dataclasses import dataclass

from service.api.schemas.fields import Experts, XLoraFields
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError, NotFoundError


@dataclass(frozen=True, slots=True)
class Virtual:
    """One name, and the `experts` it stands for."""

    id: str
    experts: Experts | None = None  # None = as the gate decides


def available(info: EngineInfo) -> list[Virtual]:
    """Every name this server answers to. An expert called "base" has none of its own."""
    base = Virtual(f"{info.model}/base", Experts.model_validate({"only": []}))
    alone = [
        Virtual(f"{info.model}/{name}", Experts.model_validate({"weights": {name: 1}}))
        for expert in info.experts
        if (name := expert["name"]) != "base"
    ]
    return [Virtual(info.model), base, *alone]


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


def steered(virtual: Virtual, xlora: XLoraFields) -> XLoraFields:
    """The caller's wishes, with what the name stands for. Raises InvalidRequestError where both choose experts."""
    if virtual.experts is None:
        return xlora
    if xlora.experts is not None:
        raise InvalidRequestError(
            f"the model {virtual.id!r} already says which experts act",
            param="xlora.experts",
            hint="leave `experts` out, or give the mixture's name as `model`",
        )
    return xlora.model_copy(update={"experts": virtual.experts})
