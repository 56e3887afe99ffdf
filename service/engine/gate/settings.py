"""AdmittedGate: the operator's run-time gate settings as a request has them from its admission on (PEFT's
set_scaling_pass_value, set_topk_lora and set_global_scaling_weight).

No torch: the rows themselves are made by the runner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.contract.request import Request
from service.contract.steering import GateSettings, Steering


@dataclass(frozen=True, slots=True)
class AdmittedGate:
    """The operator's gate settings when a request was admitted, where they differ from the checkpoint's. Top-k is not
    here: it becomes part of the request's steering.
    """

    dummy_row: bytes | None = None  # float32 [S, E], the gate of its scaling pass; None = the checkpoint's
    weight: float = 1.0  # its global_scaling_weight over the checkpoint's


CHECKPOINT_GATE = AdmittedGate()


def weight_ratio(settings: GateSettings, stored: GateSettings) -> float:
    """The global weight over the checkpoint's."""
    if settings.global_scaling_weight == stored.global_scaling_weight:
        return 1.0
    return settings.global_scaling_weight / stored.global_scaling_weight


def with_top_k(request: Request, top_k: int) -> Request:
    """The request with `top_k` experts per site, unless it sets its own top-k, or has a fixed gate."""
    if request.has_fixed_gate or (request.steering is not None and request.steering.top_k is not None):
        return request
    return replace(request, steering=replace(request.steering or Steering(), top_k=top_k))
