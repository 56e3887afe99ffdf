"""What checked steering comes to as rows of the gate. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from service.contract.checks import layer_of
from service.contract.steering import GateWeight, Steering


def excluded_experts(steering: Steering, experts: int) -> list[int]:
    """Those of `experts` experts that canonical steering leaves out."""
    only = steering.only
    return [] if only is None else [expert for expert in range(experts) if expert not in only]


def fixed_row(weights: Sequence[GateWeight], sites: Sequence[str], experts: int) -> list[list[float]]:
    """A fixed gate as a row [S, E]."""
    row = [[0.0] * experts for _ in sites]
    layers = [layer_of(site) for site in sites]
    for weight in weights:
        for site, layer in zip(row, layers, strict=True):
            if weight.layers is None or (layer is not None and weight.layers[0] <= layer <= weight.layers[1]):
                site[weight.expert] = weight.weight
    return row
