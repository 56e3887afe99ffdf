"""What an unknown field of a body is told: where it belongs, what it is called here, or which fields there are."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from service.api.errors import explain
from service.api.field_hints import hint_for, known_fields
from service.api.schemas.bodies import (
    CompareBody,
    DetokenizeBody,
    GateBody,
    GenerateBody,
    LogBody,
    ScalingsBody,
    TokenizeBody,
)
from service.api.schemas.openai import ChatBody, CompletionBody

GENERATE = {
    # misspelt or abbreviated
    **{"max_token": "max_tokens", "maxTokens": "max_tokens", "temprature": "temperature", "temp": "temperature"},
    **{"topk": "top_k", "top-p": "top_p", "TopK": "top_k", "freq_penalty": "frequency_penalty", "sede": "seed"},
    **{"expert": "experts", "gates": "gate", "retrun_scalings": "return_scalings", "logprob": "logprobs"},
    **{"repetition_penality": "repetition_penalty", "stop_tokens_ids": "stop_token_ids", "prompts": "prompt"},
    # as other servers call it
    **{"max_new_tokens": "max_tokens", "max_length": "max_tokens", "n_predict": "max_tokens"},
    **{"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "min_new_tokens": "min_tokens"},
    **{"num_return_sequences": "n", "top_logprobs": "logprobs", "return_logprob": "logprobs"},
    **{"stop_sequences": "stop", "eos_token_id": "stop_token_ids", "random_seed": "seed"},
    **{"repeat_penalty": "repetition_penalty", "json_schema": "response_format.json_schema"},
    **{"schema": "response_format.json_schema.schema", "pattern": "response_format.pattern"},
    **{"guided_json": "response_format", "guided_regex": "response_format", "grammar": "response_format"},
    **{"adapter_id": "experts", "lora": "experts", "lora_request": "experts", "input_ids": "prompt"},
    **{"inputs": "prompt", "text": "prompt", "scalings": "return_scalings", "return_gate": "return_scalings"},
    # elsewhere in the body
    **{"only": "experts.only", "weights": "experts.weights", "exclude": "experts.exclude"},
    **{"freeze_after": "gate.freeze_after", "gate_temperature": "gate.temperature", "top_k_lora": "gate.top_k"},
}
OTHERS: list[tuple[type[BaseModel], str, str]] = [
    (CompletionBody, "max_new_tokens", "max_tokens"),
    (CompletionBody, "top_logprobs", "logprobs"),
    (CompletionBody, "return_scalings", "xlora.return_scalings"),
    (CompletionBody, "scalings", "xlora.return_scalings"),
    (CompletionBody, "experts", "xlora.experts"),
    (CompletionBody, "lora", "xlora.experts"),
    (CompletionBody, "model_id", "model"),
    (CompletionBody, "include_usage", "stream_options.include_usage"),
    (ChatBody, "return_logprob", "logprobs"),
    (ChatBody, "prompt", "messages"),
    (ChatBody, "message", "messages"),
    (ChatBody, "freeze_after", "xlora.gate.freeze_after"),
    (ChatBody, "max_token", "max_tokens"),
    (CompareBody, "experts", "settings[].experts"),
    (CompareBody, "setting", "settings"),
    (CompareBody, "max_new_tokens", "max_tokens"),
    (ScalingsBody, "scalings", "return_scalings"),
    (ScalingsBody, "start", "select.start"),
    (ScalingsBody, "inputs", "prompt"),
    (GateBody, "top_k", "top_k_lora"),
    (TokenizeBody, "prompt", "text"),
    (DetokenizeBody, "tokens", "token_ids"),
]
# What has no field of its own, and a part of what is said instead.
TOLD: list[tuple[type[BaseModel], str, str]] = [
    (GenerateBody, "do_sample", "temperature 0 is greedy"),
    (GenerateBody, "best_of", "no beam search"),
    (ChatBody, "best_of", "no beam search"),
    (ChatBody, "num_beams", "no beam search"),
    (GenerateBody, "model_id", "one model is served here"),
    (GenerateBody, "model", "one model is served here"),
    (GenerateBody, "parameters", "into the body itself"),
    (GenerateBody, "xlora", "into the body itself"),
    (ChatBody, "extra_body", "into the body itself"),
    (GenerateBody, "messages", "/v1/chat/completions"),
    (GenerateBody, "echo", "/v1/completions"),
]
# Names that nothing is close to: any single field would be a wrong guess.
UNKNOWN: list[tuple[type[BaseModel], str]] = [
    (LogBody, "min_tokens"),
    (LogBody, "min_bytes"),
    (GenerateBody, "max_p"),
    (GenerateBody, "max_k"),
    (GenerateBody, "top_n"),
    (GenerateBody, "top"),
    (GenerateBody, "penalty"),
    (GenerateBody, "tokens"),
    (GenerateBody, "inputs_embeds"),
    (GenerateBody, "prompt_cache"),
    (GenerateBody, "name"),
    (GenerateBody, "no_repeat_ngram_size"),
    (GenerateBody, "x" * 100_000),
    (GateBody, "global_weight"),
    (ChatBody, "mirostat"),
]


@pytest.mark.parametrize(("name", "wanted"), GENERATE.items())
def test_generate(name: str, wanted: str) -> None:
    assert hint_for([name], GenerateBody) == f"did you mean `{wanted}`?"


@pytest.mark.parametrize(("body", "name", "wanted"), OTHERS)
def test_other_bodies(body: type[BaseModel], name: str, wanted: str) -> None:
    assert hint_for([name], body) == f"did you mean `{wanted}`?"


@pytest.mark.parametrize(("body", "name", "told"), TOLD)
def test_what_has_no_field_of_its_own(body: type[BaseModel], name: str, told: str) -> None:
    hint = hint_for([name], body)
    assert told in hint
    assert "did you mean" not in hint


@pytest.mark.parametrize(("body", "name"), UNKNOWN)
def test_a_name_that_nothing_is_close_to_gets_the_list(body: type[BaseModel], name: str) -> None:
    assert hint_for([name], body) == f"known fields: {', '.join(known_fields([name], body))}"


@pytest.mark.parametrize(
    ("location", "wanted"),
    [
        (["gate", "freeze"], "did you mean `freeze_after`?"),
        (["gate", "max_tokens"], "did you mean `max_tokens`?"),
        (["experts", "temperature"], "did you mean `temperature` or `gate.temperature`?"),
        (["experts", "weight"], "did you mean `weights`?"),
        (["response_format", "schema"], "did you mean `response_format.json_schema.schema`?"),
        (["response_format", "regex"], "known fields: json_schema, pattern, type"),
        (["experts", "include"], "known fields: exclude, only, weights"),
    ],
)
def test_inside_an_object_of_generate(location: list[str], wanted: str) -> None:
    assert hint_for(location, GenerateBody) == wanted


def test_no_hint_names_a_field_that_is_not_there() -> None:
    """Whatever other servers' names are tried on whatever body."""
    names = {*GENERATE, *(name for _, name, _ in (*OTHERS, *TOLD)), *(name for _, name in UNKNOWN)}
    for body in (GenerateBody, CompletionBody, ChatBody, CompareBody, ScalingsBody, GateBody, LogBody, TokenizeBody):
        for name in names - set(known_fields([""], body)):
            for path in _proposed(hint_for([name], body)):
                assert _resolves(path, body), (body.__name__, name, path)


def _proposed(hint: str) -> list[str]:
    return hint.split("`")[1::2] if hint.startswith("did you mean") else []


def _resolves(path: str, body: type[BaseModel]) -> bool:
    parts = path.replace("[]", "").split(".")
    return all(part in known_fields(parts[: depth + 1], body) for depth, part in enumerate(parts))


def test_the_hint_is_what_a_caller_sees() -> None:
    value: dict[str, Any] = {"prompt": "a", "gate": {"top_p": 0.5}}
    with pytest.raises(ValidationError) as caught:
        GenerateBody.model_validate(value)
    error = explain(caught.value.errors(), "/generate")
    assert (error.param, error.code, error.hint) == ("gate.top_p", "unknown_field", "did you mean `top_p`?")
