"""What must hold of a request's steering and of the operator's gate settings on this model, and steering in one
canonical form. The API and the engine both call these: what the API has let through the engine need not explain.

Canonical: `exclude` has become part of `only`, which is sorted; who leaves no expert has weights=() (a fixed gate of
zeros); what changes nothing is None. So equal gates have equal cache keys, and a gate is fixed if it has weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import Request
from service.contract.steering import GateSettings, GateWeight, Steering

_LARGEST_WEIGHT = 100.0  # beyond it half precision overflows sooner than anyone learns anything


def with_checked_steering(request: Request, info: EngineInfo) -> Request:
    """The request with its steering in canonical form. Raises InvalidRequestError where it cannot be followed."""
    steering = request.steering
    if steering is None:
        return request
    if steering.weights is not None:
        if steering != Steering(weights=steering.weights):
            raise InvalidRequestError(
                "weights are a fixed gate: they go with no other choice of experts, temperature or top_k",
                param="experts.weights",
            )
        _check_weights(steering.weights, info)
    else:
        _check_gate(steering, info)
        steering = _canonical(steering, len(info.experts))
    if request.sampling is None and steering.weights is not None:
        raise InvalidRequestError("a fixed gate has no scaling pass that one could look at", param="experts")
    return replace(request, steering=None if steering == Steering() else steering)


def stored_settings(xlora_config: Mapping[str, Any]) -> GateSettings:
    """The checkpoint's own."""
    return GateSettings(
        xlora_config["scaling_pass_value"], xlora_config["top_k_lora"], xlora_config["global_scaling_weight"]
    )


def check_settings(settings: GateSettings, info: EngineInfo) -> None:
    """Raises InvalidRequestError for what this model cannot follow."""
    for name in ("scaling_pass_value", "global_scaling_weight"):
        value = getattr(settings, name)
        if value is not None and not -_LARGEST_WEIGHT <= value <= _LARGEST_WEIGHT:  # NaN is neither
            raise InvalidRequestError(
                f"`{name}` is {value}; it must be from -{_LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}", param=name
            )
    experts = len(info.experts)
    if settings.top_k_lora is not None and not 1 <= settings.top_k_lora <= experts:
        raise InvalidRequestError(
            f"`top_k_lora` is {settings.top_k_lora}; this model has 1 to {experts} experts to keep",
            param="top_k_lora",
            hint="null keeps all",
        )
    stored = stored_settings(info.xlora_config).global_scaling_weight
    if stored == 0.0 and settings.global_scaling_weight != 0.0:
        raise InvalidRequestError(
            "the checkpoint's own global_scaling_weight is 0, which no other can replace at run time",
            param="global_scaling_weight",
            hint="change it in the checkpoint's xlora_config.json",
        )


def layer_of(site: str) -> int | None:
    """The layer of a site, by its name: "model.layers.3.self_attn.q_proj" is of layer 3; None outside all layers."""
    return next((int(part) for part in site.split(".") if part.isdigit()), None)


def _canonical(steering: Steering, experts: int) -> Steering:
    acting = set(range(experts) if steering.only is None else steering.only) - set(steering.exclude)
    if not acting:
        return Steering(weights=())
    only = None if len(acting) == experts else tuple(sorted(acting))
    return replace(steering, only=only, exclude=())


def _check_gate(steering: Steering, info: EngineInfo) -> None:
    experts = len(info.experts)
    _check_experts(steering.only or (), "experts.only", experts)
    _check_experts(steering.exclude, "experts.exclude", experts)
    if steering.temperature is not None:
        if not 0.0 < steering.temperature < float("inf"):
            raise InvalidRequestError(
                f"the gate's temperature is {steering.temperature}; it must be a finite number over 0",
                param="gate.temperature",
            )
        if not info.xlora_config["enable_softmax"]:
            raise InvalidRequestError(
                "this checkpoint's gate has no softmax, so a temperature would change nothing", param="gate.temperature"
            )
    if steering.top_k is not None and not 1 <= steering.top_k <= experts:
        raise InvalidRequestError(f"the gate's top_k is {steering.top_k}, not 1 to {experts}", param="gate.top_k")


def _check_weights(weights: Sequence[GateWeight], info: EngineInfo) -> None:
    _check_experts((weight.expert for weight in weights), "experts.weights", len(info.experts))
    last = max((layer for site in info.sites if (layer := layer_of(site)) is not None), default=-1)
    for weight in weights:
        if not -_LARGEST_WEIGHT <= weight.weight <= _LARGEST_WEIGHT:
            raise InvalidRequestError(
                f"the weight {weight.weight} is not between -{_LARGEST_WEIGHT:g} and {_LARGEST_WEIGHT:g}",
                param="experts.weights",
            )
        if weight.layers is None:
            continue
        if not info.xlora_config["layerwise_scalings"]:
            raise InvalidRequestError(
                "this checkpoint's gate has one row for all layers (layerwise_scalings is false)",
                param="experts.weights",
                hint="leave the layers out",
            )
        if not 0 <= weight.layers[0] <= weight.layers[1] <= last:
            raise InvalidRequestError(
                f"layers {weight.layers[0]} to {weight.layers[1]} are not a range within 0 to {last}",
                param="experts.weights",
            )


def _check_experts(chosen: Iterable[int], param: str, experts: int) -> None:
    for expert in chosen:
        if not 0 <= expert < experts:
            raise InvalidRequestError(f"expert {expert} is not one of the {experts} (0 to {experts - 1})", param=param)
