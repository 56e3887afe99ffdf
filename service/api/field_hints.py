"""Hints for a field that a body does not have: where it belongs, what it is called here, what to do without it.

Knows the names that other servers have for what this one does (vLLM, TGI, SGLang, llama.cpp, Ollama, OpenAI), and the
bodies of the routes as types; knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from service.api.schemas.body import field_names
from service.contract.spelling import likely

# Objects whose fields people look for elsewhere in the body.
_CONTAINERS = ("experts", "gate", "xlora", "settings", "select", "stream_options", "response_format", "json_schema")
_GENERAL = ("name", "description", "strict", "type", "label")  # say too little about the object that they are missed in
_SAME = {  # our name: theirs
    "max_tokens": "max_new_tokens max_completion_tokens max_output_tokens max_gen_len max_gen_tokens max_gen_toks "
    "max_length max_len max_tokens_to_sample max_tokens_to_generate num_predict n_predict output_len num_tokens",
    "min_tokens": "min_new_tokens min_length min_completion_tokens",
    "logprobs": "top_logprobs return_logprob return_logprobs return_log_probs top_logprobs_num top_n_tokens n_probs "
    "num_logprobs output_logprobs details",
    "n": "num_return_sequences num_samples num_choices n_choices num_generations num_outputs",
    "stop": "stop_sequences stop_sequence stop_strings stop_words stops until",
    "stop_token_ids": "stop_tokens stop_ids eos_token_id eos_token_ids",
    "seed": "random_seed sampling_seed rng_seed",
    "repetition_penalty": "repeat_penalty rep_pen",
    "response_format": "guided_json guided_regex guided_choice guided_grammar guided_decoding structured_outputs "
    "json_schema json_object schema regex grammar ebnf structural_tag format",
    "ignore_eos": "ignore_eos_token",
    "timeout": "deadline max_time request_timeout timeout_seconds timeout_s",
    "stream": "streaming",
    "logit_bias": "logits_bias bias logit_biases",
    "cache_salt": "salt cache_key prompt_cache_key",
    "return_scalings": "scalings return_scaling scaling output_scalings return_gate return_gates gate_weights "
    "return_gate_weights return_weights return_expert_weights return_experts return_router router_weights "
    "return_routing output_router_logits show_scalings with_scalings include_scalings",
    "scalings_start": "return_scalings_start start_scalings",
    "scalings_dtype": "return_scalings_dtype dtype",
    "gate.temperature": "gate_temperature softmax_temperature router_temperature",
    "gate.top_k": "gate_top_k top_k_lora top_k_experts num_experts num_experts_per_tok",
    "top_k_lora": "top_k gate_top_k top_k_experts",
    "gate.freeze_after": "freeze freeze_gate gate_freeze_after",
    "experts": "adapter adapters adapter_id adapter_ids adapter_name adapter_source lora loras lora_id lora_ids "
    "lora_name lora_path lora_request lora_adapter lora_adapters expert_ids expert_names experts_weights "
    "expert_weights",
    "model": "model_id model_name engine deployment",
    "prompt": "input inputs text texts query input_ids input_text prompt_ids prompt_token_ids prompt_tokens token_ids "
    "content",
    "text": "prompt input inputs content",
    "messages": "prompt input inputs conversation history",
    "token_ids": "tokens ids input_ids",
    "settings": "gates variants configs configurations",
}
_NO_MODEL = "one model is served here; leave it out. `experts` chooses among its experts"
_BEAM = "there is no beam search; `n` gives several sampled texts"
_NESTED = "its fields belong into the body itself"
_INSTEAD: dict[str, str] = {  # what has no field of ours
    "do_sample": "temperature 0 is greedy, and any other temperature samples",
    **dict.fromkeys(
        ("best_of", "num_beams", "use_beam_search", "beam_width", "length_penalty", "early_stopping"), _BEAM
    ),
    **dict.fromkeys(("model", "model_id", "model_name"), _NO_MODEL),
    **dict.fromkeys(("parameters", "sampling_params", "sampling_parameters", "options", "generation_config"), _NESTED),
    **dict.fromkeys(("generation_kwargs", "extra_body", "xlora"), _NESTED),
    "stream_options": "a stream's last event always has the usage; leave it out",
    "messages": "POST /v1/chat/completions takes messages",
    "prompt_logprobs": "POST /scalings with `perplexity` says how likely each token of a prompt is",
    "echo": "POST /v1/completions has `echo`",
    "return_full_text": "POST /v1/completions with `echo` has the prompt before the text",
    "global_scaling_weight": "PATCH /gate sets it, for all requests",
    "scaling_pass_value": "PATCH /gate sets it, for all requests",
}
_THEIRS = [(theirs, ours) for ours, names in _SAME.items() for theirs in names.split()]


def hint_for(location: Sequence[str], body: type[BaseModel]) -> str:
    """The hint about the unknown field at the end of `location` in a body."""
    name, known = location[-1], known_fields(location, body)
    places = _places(body, location)
    if found := places.get(name):
        return _did_you_mean(found[:2])
    for ours in [ours for theirs, ours in _THEIRS if theirs == name.lower()]:
        if ours in known or ours.rpartition(".")[0] in location[-2:-1]:
            return _did_you_mean([ours.rpartition(".")[2]])
        if found := _ending(places, ours):
            return _did_you_mean(found[:1])
    if name.lower() in _INSTEAD:
        return _INSTEAD[name.lower()]
    if close := likely(name, known):
        return _did_you_mean([close])
    if close := likely(name, places):
        return _did_you_mean(places[close][:2])
    return f"known fields: {', '.join(known)}"


def known_fields(location: Sequence[str], body: type[BaseModel]) -> list[str]:
    """The fields of the object that the field at the end of `location` is in."""
    model = body
    for name in location[:-1]:
        if name in model.model_fields:
            model = _model_in(model.model_fields[name].annotation) or model
    return sorted(field_names(model))


def _did_you_mean(paths: Sequence[str]) -> str:
    return f"did you mean {' or '.join(f'`{path}`' for path in paths)}?"


def _ending(places: Mapping[str, list[str]], ours: str) -> list[str]:
    """The paths of a field, or those that end with a path of two parts."""
    return [path for path in places.get(ours.rpartition(".")[2], []) if f".{path}".endswith(f".{ours}")]


def _places(body: type[BaseModel], location: Sequence[str]) -> dict[str, list[str]]:
    """The paths in a body, by the last of their names, the shortest first; without the objects around `location`."""
    around = ".".join(location).replace(".[", "[")
    found: dict[str, list[str]] = {}
    for path in sorted(_paths(body, ""), key=lambda path: path.count(".")):
        name = path.rpartition(".")[2]
        if name not in _GENERAL and not around.startswith(f"{path}."):
            found.setdefault(name, []).append(path)
    return found


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name in sorted(field_names(model)):
        yield prefix + name
        field = model.model_fields.get(name)
        inner = _model_in(field.annotation) if field is not None and name in _CONTAINERS else None
        if field is not None and inner is not None:
            yield from _paths(inner, f"{prefix}{name}{'[]' if _is_list(field.annotation) else ''}.")


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(get_origin(part) is list for part in get_args(annotation))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Gate | None` or `list[Message]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
