"""The names a request may give as `model`: the mixture, its base alone, and each expert alone, always with weight 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.api.schemas.fields import Experts, XLoraFields
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError, NotFoundError


@dataclass(frozen=True, slots=True)
class Virtual:
    """One name, and the `experts` it stands for."""

    id: str
    experts: Experts | None = None  # None = as the gate decides


def available(names: Sequence[str], info: EngineInfo) -> list[Virtual]:
    """Every name this server answers to; `names` are those of the mixture. An expert called "base" has none of its
    own.
    """
    experts = [expert["name"] for expert in info.experts if expert["name"] != "base"]
    found: list[Virtual] = []
    for model in names:
        found += [Virtual(model), Virtual(f"{model}/base", Experts.model_validate({"only": []}))]
        found += [Virtual(f"{model}/{name}", Experts.model_validate({"weights": {name: 1}})) for name in experts]
    return found


def resolve(name: str | None, names: Sequence[str], info: EngineInfo) -> Virtual:
    """The model that a request's `model` names; the mixture when absent. Raises NotFoundError for other names."""
    known = {virtual.id: virtual for virtual in available(names, info)}
    if name is None:
        return known[names[0]]
    if name not in known:
        raise NotFoundError(
            f"this server has no model {name[:100]!r}",
            param="model",
            code="model_not_found",
            hint=f"the models are {', '.join(known)}",
        )
    return known[name]


def steered(virtual: Virtual, xlora: XLoraFields) -> XLoraFields:
    """The caller's params, with what the name stands for. Raises InvalidRequestError where both choose experts."""
    if virtual.experts is None:
        return xlora
    if xlora.experts is not None:
        raise InvalidRequestError(
            f"the model {virtual.id!r} already says which experts act",
            param="xlora.experts",
            hint="leave `experts` out, or give the mixture's name as `model`",
        )
    return xlora.model_copy(update={"experts": virtual.experts})
