"""How a request, or everybody, wants the gate: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GateWeight:
    """The weight of one expert in a fixed gate, at every site or at those of some layers."""

    expert: int  # its place in EngineInfo.experts
    weight: float  # finite, from -100 to 100; 1 is the expert as it was trained
    layers: tuple[int, int] | None = None  # the first and the last layer, both included; None = every site


@dataclass(frozen=True, slots=True)
class Steering:
    """A caller's changes to the gate of the real pass; nothing here changes the scaling pass.

    Experts are given by their place in EngineInfo.experts. `only` and `exclude` together leave the experts of `only`
    that are not in `exclude`; those left out are at -inf before the softmax (at 0 where the checkpoint has none), then
    top-k comes as usual. Where nobody is left, this is the base model.

    `weights` is a fixed gate: no classifier runs, experts that are not named are 0, and of several entries that cover a
    site and an expert the last counts. Top-k does not apply to it, global_scaling_weight does. It goes with nothing
    else of this class; weights=() is the base model.
    """

    only: tuple[int, ...] | None = None  # None = all
    exclude: tuple[int, ...] = ()
    weights: tuple[GateWeight, ...] | None = None
    temperature: float | None = None  # > 0; in place of softmax_temperature
    top_k: int | None = None  # 1 .. number of experts, which switches it off; in place of top_k_lora


@dataclass(frozen=True, slots=True)
class GateSettings:
    """The settings that an operator may change at run time, by PEFT's names, for requests that are admitted later."""

    scaling_pass_value: float | None  # None = 1 / number of experts
    top_k_lora: int | None  # None = all experts act
    global_scaling_weight: float
