"""The gate as an operator may change it at run time: PEFT's set_scaling_pass_value, set_topk_lora and
set_global_scaling_weight, for the requests that are admitted afterwards.

Knows which values a model can follow and what they mean for one request. The rows themselves are the runner's, and so
this file needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from service.engine.request import EngineInfo, GateSettings, Request, Steering
from service.errors import InvalidRequestError

LARGEST_SETTING = 100.0  # as for the weights of a fixed gate


@dataclass(frozen=True, slots=True)
class AdmittedGate:
    """What held when a request was admitted, as far as it is not the checkpoint's; top-k is part of its steering."""

    dummy_row: bytes | None = None  # float32 [S, E], the gate of its scaling pass; None = the checkpoint's
    weight: float = 1.0  # its global_scaling_weight over the checkpoint's


CHECKPOINT_GATE = AdmittedGate()


def stored_settings(xlora_config: Mapping[str, Any]) -> GateSettings:
    """The checkpoint's own."""
    return GateSettings(
        xlora_config["scaling_pass_value"], xlora_config["top_k_lora"], xlora_config["global_scaling_weight"]
    )


def check_settings(settings: GateSettings, info: EngineInfo) -> None:
    """Raises InvalidRequestError for what this model cannot follow."""
    for name in ("scaling_pass_value", "global_scaling_weight"):
        value = getattr(settings, name)
        if value is not None and not -LARGEST_SETTING <= value <= LARGEST_SETTING:  # NaN is neither
            raise InvalidRequestError(
                f"`{name}` is {value}; it must be from -{LARGEST_SETTING:g} to {LARGEST_SETTING:g}", param=name
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


def weight_ratio(settings: GateSettings, stored: GateSettings) -> float:
    """The global weight over the checkpoint's."""
    if settings.global_scaling_weight == stored.global_scaling_weight:
        return 1.0
    return settings.global_scaling_weight / stored.global_scaling_weight


def with_top_k(request: Request, top_k: int) -> Request:
    """The request with `top_k` experts per site, unless it says itself how many, or has a fixed gate."""
    if request.has_fixed_gate or (request.steering is not None and request.steering.top_k is not None):
        return request
    return replace(request, steering=replace(request.steering or Steering(), top_k=top_k))
