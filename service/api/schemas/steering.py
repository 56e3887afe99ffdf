"""Between the names of the wire's `experts` and `gate` and the numbers of the engine's Steering.

What a model cannot follow is refused by contract/checks.py, here already: before the call takes a place in the queue.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from service.api.schemas.answers import Steered
from service.api.schemas.fields import Experts, Gate, LayerWeight, SteeringFields
from service.contract.checks import checked_steering
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.steering import GateWeight, Steering

_SHOWN_CHARACTERS = 60


def steering_of(xlora: SteeringFields, info: EngineInfo) -> Steering | None:
    """The engine's view, in canonical form. Raises InvalidRequestError for a name that is no expert's, and as
    checked_steering does.
    """
    experts, gate = xlora.experts or Experts.model_validate({}), xlora.gate or Gate.model_validate({})
    places = {expert["name"]: place for place, expert in enumerate(info.experts)}
    only, weights = experts.only, experts.weights
    steering = Steering(
        only=None if only is None else tuple(_places(only, places, "experts.only")),
        exclude=tuple(_places(experts.exclude or (), places, "experts.exclude")),
        weights=None if weights is None else tuple(_gate_weights(weights, places)),
        temperature=gate.temperature,
        top_k=gate.top_k,
    )
    return checked_steering(steering, info)


def as_used(xlora: SteeringFields) -> Steered:
    """`experts` and `gate` for the answer, as a caller would write them; each only where it says something."""
    used: Steered = {}
    if xlora.experts is not None:
        experts = xlora.experts.model_dump(exclude_none=True, exclude={"weights"})
        if xlora.experts.weights is not None:
            experts["weights"] = {name: _as_written(weights) for name, weights in xlora.experts.weights.items()}
        if experts:
            used["experts"] = experts
    if xlora.gate is not None and (gate := xlora.gate.model_dump(exclude_none=True)):
        used["gate"] = gate
    return used


def _as_written(weights: list[LayerWeight]) -> float | list[dict[str, Any]]:
    if len(weights) == 1 and weights[0].layers is None:
        return weights[0].weight
    return [weight.model_dump(exclude_none=True) for weight in weights]


def _gate_weights(weights: dict[str, list[LayerWeight]], places: dict[str, int]) -> Iterable[GateWeight]:
    for place, entries in zip(_places(weights, places, "experts.weights"), weights.values(), strict=True):
        for entry in entries:
            layers = None if entry.layers is None else (entry.layers[0], entry.layers[1])
            yield GateWeight(place, entry.weight, layers)


def _places(names: Iterable[str], places: dict[str, int], param: str) -> Iterable[int]:
    for name in names:
        if name not in places:
            close = difflib.get_close_matches(name[:_SHOWN_CHARACTERS], places, n=1)
            known = f"the experts are {', '.join(places)}"
            raise InvalidRequestError(
                f"`{param}` names {name[:_SHOWN_CHARACTERS]!r}, which is not an expert of this model",
                param=param,
                code="unknown_expert",
                hint=f"did you mean `{close[0]}`? {known}" if close else known,
            )
        yield places[name]
