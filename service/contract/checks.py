"""The conditions that a request and the operator's gate settings must meet on this model, and steering in one canonical
form.

Requests are checked where they leave the API's process, by `checked_request`: the engine takes what it is sent.

Canonical: `exclude` has become part of `only`, which is sorted; who leaves no expert has weights=() (a fixed gate of
zeros); what changes nothing is None. So equal gates have equal cache keys, and a gate is fixed if it has weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import Request
from service.contract.steering import GateSettings, GateWeight, Steering

_MAX_WEIGHT = 100.0  # beyond it half precision overflows sooner than anyone learns anything


def checked_request(request: Request, info: EngineInfo) -> Request:
    """The request with its steering in canonical form.

    Raises InvalidRequestError when it can never be served: empty, longer than the model's context or than the whole KV
    pool, token ids that the model does not have, steering that it cannot follow.
    """
    request = replace(request, steering=checked_steering(request.steering, info))
    if request.sampling is None and request.has_fixed_gate:
        raise InvalidRequestError(
            "experts.weights fixes the gate, so there is no scaling pass to return", param="experts"
        )
    check_token_ids(request.prompt_token_ids, "prompt", info)
    if request.sampling is not None:
        check_token_ids(request.sampling.logit_bias, "logit_bias", info)
    _check_scores(request)
    _check_lengths(request)
    check_context(len(request.prompt_token_ids), _output_tokens(request), info)
    _check_pool(request, info)
    return request


def check_token_ids(ids: Collection[int], param: str, info: EngineInfo) -> None:
    """Raises InvalidRequestError for ids that the model does not have. On a GPU one of them would end the process, and
    a negative one would be another's.
    """
    if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
        unknown = next(id for id in ids if not 0 <= id < info.vocab_size)
        raise InvalidRequestError(
            f"`{param}` has the token id {str(unknown)[:20]}; ids go from 0 to {info.vocab_size - 1}",
            param=param,
            code="unknown_token",
        )


def check_context(prompt_tokens: int, max_tokens: int, info: EngineInfo, field: str = "max_tokens") -> None:
    """Raises InvalidRequestError where prompt and output are longer than the model's context; `field` is the request's
    own name of max_tokens.
    """
    room = info.max_model_len - prompt_tokens
    if room < min(1, max_tokens):
        raise InvalidRequestError(
            f"the prompt's {prompt_tokens} tokens leave no room in the context of {info.max_model_len}",
            param="prompt",
            code="context_length_exceeded",
            hint="shorten the prompt",
        )
    if max_tokens > room:
        raise InvalidRequestError(
            f"prompt ({prompt_tokens} tokens) + {field} ({max_tokens}) = {prompt_tokens + max_tokens} is over the "
            f"context of {info.max_model_len} tokens",
            param=field,
            code="context_length_exceeded",
            hint=f"lower {field} to {room} or shorten the prompt",
        )


def room_for_output(prompt_tokens: int, info: EngineInfo) -> int:
    """The most tokens that may follow a prompt: what the context leaves, or the whole KV pool in two streams. At least
    1, which `checked_request` refuses where there is no room.
    """
    pool = info.kv_blocks_total // 2 * info.block_size
    return max(1, min(info.max_model_len, pool) - prompt_tokens)


def checked_steering(steering: Steering | None, info: EngineInfo) -> Steering | None:
    """Steering in canonical form; equal gates are equal. Raises InvalidRequestError where it cannot be followed."""
    if steering is None:
        return None
    if steering.weights is not None:
        if steering != Steering(weights=steering.weights):
            raise InvalidRequestError(
                "weights fix the gate: they do not go with only, exclude, temperature or top_k",
                param="experts.weights",
            )
        _check_weights(steering.weights, info)
    else:
        _check_gate(steering, info)
        steering = _canonical(steering, len(info.experts))
    return None if steering == Steering() else steering


def stored_settings(xlora_config: Mapping[str, Any]) -> GateSettings:
    """The checkpoint's own."""
    return GateSettings(
        xlora_config["scaling_pass_value"], xlora_config["top_k_lora"], xlora_config["global_scaling_weight"]
    )


def check_settings(settings: GateSettings, info: EngineInfo) -> None:
    """Raises InvalidRequestError for what this model cannot follow."""
    for name in ("scaling_pass_value", "global_scaling_weight"):
        value = getattr(settings, name)
        if value is not None and not -_MAX_WEIGHT <= value <= _MAX_WEIGHT:  # NaN is neither
            raise InvalidRequestError(
                f"`{name}` is {value}; it must be from -{_MAX_WEIGHT:g} to {_MAX_WEIGHT:g}", param=name
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


def _output_tokens(request: Request) -> int:
    return 0 if request.sampling is None else request.sampling.max_tokens


def _check_scores(request: Request) -> None:
    if request.score_from is None:
        return
    sampling, last = request.sampling, len(request.prompt_token_ids) - 1
    if not 1 <= request.score_from <= last:
        raise InvalidRequestError(
            f"score_from is {request.score_from}; tokens 1 to {last} can be scored", param="score_from"
        )
    if sampling is None or sampling.max_tokens or sampling.n > 1 or sampling.prompt_logprobs is None:
        raise InvalidRequestError("scores need prompt_logprobs, max_tokens 0 and n 1", param="score_from")
    if request.return_scalings != "none":
        raise InvalidRequestError("scores come without scalings", param="return_scalings")


def _check_lengths(request: Request) -> None:
    """Refuses a request without a prompt, or without tokens to generate."""
    output = _output_tokens(request)
    if not request.prompt_token_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt", hint="send at least one token")
    if request.sampling is not None and output < 1 and request.score_from is None:
        raise InvalidRequestError(f"max_tokens is {output}; at least 1 is needed", param="max_tokens")
    if request.sampling is not None and request.sampling.min_tokens > output:
        raise InvalidRequestError(
            f"min_tokens is {request.sampling.min_tokens}, and at most {output} tokens are generated",
            param="min_tokens",
            hint="lower min_tokens, or raise max_tokens",
        )
    if request.freeze_after is not None and (request.freeze_after < 1 or request.sampling is None):
        raise InvalidRequestError(
            f"freeze_after is {request.freeze_after}; it counts generated tokens, from 1 on",
            param="gate.freeze_after",
        )


def _check_pool(request: Request, info: EngineInfo) -> None:
    """Each stream needs the blocks of the whole text; a fixed gate has no scaling stream, a scaling pass no other."""
    streams = 1 if request.sampling is None or request.has_fixed_gate else 2
    total = len(request.prompt_token_ids) + _output_tokens(request)
    needed = streams * -(-total // info.block_size)
    if needed > info.kv_blocks_total:
        raise InvalidRequestError(
            f"the request needs {needed} KV blocks, and the server has {info.kv_blocks_total} in all",
            code="context_length_exceeded",
            hint="shorten the prompt, ask for fewer tokens, or start the server with a larger --kv-memory",
        )


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
        if not -_MAX_WEIGHT <= weight.weight <= _MAX_WEIGHT:
            raise InvalidRequestError(
                f"the weight {weight.weight} is not between -{_MAX_WEIGHT:g} and {_MAX_WEIGHT:g}",
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
