"""Calls of functions: the form of their text, against jsonschema, and how it is read, however it is cut."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import jsonschema_rs
import pytest
from tokenizers import Tokenizer

from service.api.generation.tool_calls import CallReader
from service.api.generation.tool_forms import parameters, tool_form
from service.api.schemas.tools import Function
from service.api.structured_output.grammar_spec import GrammarSpecs, question_of_call
from service.api.structured_output.validation_process import Question, judge
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import FormLimits, GrammarSpec
from service.grammar import GrammarCompiler
from tests.support.fake_engine import build_tokenizer, fake_info, write_bundle

WORD = {"type": "string", "maxLength": 3}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "f": {"type": "object", "properties": {"$ref": WORD, "const": DIGIT}, "required": ["const"]},
    "f_with": {
        "$defs": {"Part": {"type": "object", "properties": {"word": WORD}, "required": ["word"]}},
        "type": "object",
        "properties": {"part": {"$ref": "#/$defs/Part"}, "parts": {"type": "array", "items": {"$ref": "#/$defs/Part"}}},
        "required": ["part"],
    },
    "f_other": {
        "$defs": {"Part": {"type": "object", "properties": {"digit": DIGIT}, "required": ["digit"]}},
        "$ref": "#/$defs/Part",
    },
    "tree": {"properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["left"]},
    "either": {
        "properties": {"a": DIGIT, "b": DIGIT},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
    "by_id": {  # as `anchored`, by everything else that a reference may begin with
        "$id": "https://example.org/named",
        "$defs": {"x": {"$anchor": "part", **WORD}, "y": DIGIT},
        "properties": {
            "word": {"$ref": "#part"},
            "digit": {"$ref": "https://example.org/named#/$defs/y"},
            "parts": {"type": "array", "prefixItems": [{"$ref": "#/$defs/x"}, {"$ref": "#part"}], "items": False},
        },
        "required": ["word", "parts"],
    },
    "anchored": {
        "$defs": {"x": {"$anchor": "part", **DIGIT}},
        "properties": {"digit": {"$ref": "#part"}},
        "required": ["digit"],
    },
    "old": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"x": DIGIT},
        "properties": {"pair": {"type": "array", "items": [{"$ref": "#/definitions/x"}], "additionalItems": False}},
        "required": ["pair"],
    },
    "constant": {"type": "object", "properties": {"x": {"const": {"$ref": "#/x"}}}, "required": ["x"]},
}


NOTHING: list[dict[str, Any] | None] = [
    *(None, {}, {"type": "object", "properties": {}}),
    {"type": None, "additionalProperties": {"type": "null"}, "nullable": True},
]
PROPERTIES = {"part", "parts", "digit", "left", "a", "b", "x", "const", "$ref", "word", "pair"}
CALLED = [list(FUNCTIONS), *([name] for name in FUNCTIONS)]


async def form_of(forms: GrammarSpecs, *functions: dict[str, Any]) -> GrammarSpec:
    return await tool_form(forms, {place: Function.model_validate(one) for place, one in enumerate(functions)})


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> EngineInfo:
    return fake_info(write_bundle(tmp_path_factory.mktemp("fake")))


@pytest.fixture(scope="module")
def compiler(info: EngineInfo) -> GrammarCompiler:
    return GrammarCompiler(info.tokenizer_path, info.vocab_size, info.eos_token_ids)


@pytest.fixture(scope="module")
def made(info: EngineInfo) -> list[GrammarSpec]:
    """The forms of calls of CALLED, and of functions that take nothing."""
    functions = [[{"name": name, "parameters": FUNCTIONS[name]} for name in names] for names in CALLED]
    functions += [[{"name": "f", "parameters": parameters}] for parameters in NOTHING]

    async def make() -> list[GrammarSpec]:
        forms = GrammarSpecs(info)
        try:
            return [await form_of(forms, *some) for some in functions]
        finally:
            forms.close()

    return asyncio.run(make())


def written(compiler: GrammarCompiler, form: GrammarSpec, seed: int) -> list[str]:
    """The pieces of a random text of a form: short ones, because it ends what it can."""
    chance, tokenizer = random.Random(seed), build_tokenizer()
    cursor, tokens = compiler.compile(form).start(), list[int]()
    ends = [tokenizer.token_to_id(token) for token in ('"', "}", "]", "n")]
    while not cursor.finished:
        mask = cursor.allowed()
        allowed = [id for id in range(258) if mask[id // 8] >> id % 8 & 1]
        ending = [id for id in ends if id in allowed]
        tokens.append(chance.choice(ending if ending and chance.random() < 0.5 else allowed))
        cursor.accept(tokens[-1])
        assert len(tokens) < 2000, "it does not end"
    return pieces(tokenizer, tokens)


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    texts = [tokenizer.decode(tokens[: end + 1]).rstrip("\ufffd") for end in range(len(tokens))]
    return [text[len(before) :] for before, text in zip(["", *texts], texts, strict=False)]


@pytest.mark.parametrize("names", CALLED, ids=" ".join)
def test_calls_fit_the_parameters(compiler: GrammarCompiler, made: list[GrammarSpec], names: list[str]) -> None:
    """Of every function, though definitions of several have one name and another meaning."""
    form, called = made[CALLED.index(names)], set()
    for seed in range(400 if len(names) > 1 else 4):
        reader, texts = CallReader(names), written(compiler, form, seed)
        arguments = json.loads("".join(map(reader.push, texts)))
        assert reader.complete
        whole = json.loads("".join(texts))
        assert whole == (arguments if len(names) == 1 else {"name": reader.name, "arguments": arguments})
        assert reader.name is not None
        jsonschema_rs.validator_for(FUNCTIONS[reader.name]).validate(arguments)
        assert arguments.keys() <= PROPERTIES, "not closed"
        called.add(reader.name)
    assert called == set(names)


def test_the_parameters_of_many_functions_count_for_each(compiler: GrammarCompiler) -> None:
    """And of all together, where there are too many of them."""

    def question(functions: int, properties: int, depth: int) -> Question:
        schema: dict[str, Any] = {"type": "integer"}
        for _ in range(depth):
            schema = {"items": schema}
        listed = {"properties": {f"p{number}": schema for number in range(properties)}}
        named = {f"f{place}": Function(name=f"f{place}", parameters=listed) for place in range(functions)}
        documents = {name: parameters(place, one) for place, (name, one) in enumerate(named.items())}
        return question_of_call(documents, FormLimits())

    for asked in (question(128, 8, 0), question(2, 1, 28)):
        assert judge(compiler, asked).error is None
    verdict = judge(compiler, question(3, 401, 0))
    assert (verdict.param, "401 properties" in str(verdict.error)) == ("tools[0].function.parameters", True)
    verdict = judge(compiler, question(128, 20, 0))
    assert (verdict.param, "2560 properties" in str(verdict.error)) == ("tools", True)
    with pytest.raises(InvalidRequestError, match=r"`tools\[0\].function.parameters` is nested more than 32 deep"):
        question(2, 1, 29)


@pytest.mark.parametrize("seed", range(20))
def test_a_call_is_read_however_it_is_cut(seed: int) -> None:
    chance = random.Random(seed)
    tricky = ['}"', "\\", '\\"', "a\\\\", "{[", "é🙂", "\n", '","arguments":{', ""]
    value = {
        one: [{one: chance.choice(tricky)}, chance.choice([1.5, None, {}, []])] for one in chance.sample(tricky, 4)
    }
    arguments = json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1]))
    name = chance.choice(["f", "f_with"])
    text = f'{{ "name" :"{name}" , "arguments": {arguments} }}'
    for names, whole in ((["f", "f_with"], text), ([name], f" {arguments}")):
        reader, told, start = CallReader(names), "", 0
        while start < len(whole):
            end = start + chance.randrange(1, 9)
            was_complete, added = reader.complete, reader.push(whole[start:end])
            assert not (was_complete and added)
            told, start = told + added, end
        assert (reader.name, told, reader.complete) == (name, arguments, True)
        cut = CallReader(names)
        cut.push(whole[: len(whole) - 3])
        assert not cut.complete or len(names) == 2


def test_what_a_function_takes_that_says_nothing(compiler: GrammarCompiler, made: list[GrammarSpec]) -> None:
    """No arguments; where nothing is said of the type alone, any object."""
    for form in made[len(CALLED) : -1]:
        assert {"".join(written(compiler, form, seed)).replace(" ", "") for seed in range(9)} == {"{}"}
    assert all("".join(written(compiler, made[-1], seed)).startswith("{") for seed in range(9))


@pytest.mark.parametrize(
    ("stated", "param"),
    [
        ({"type": "string"}, ".type"),
        ({"type": ["array", "null"]}, ".type"),
        ({"properties": {"x": {"if": True}}}, ".properties.x.if"),
        ({"properties": {"x": {"pattern": "a" * 5000}}}, ".properties.x.pattern"),
        ({"properties": {"x": {"pattern": "(.{1,60}a){30}"}}}, ".properties.x"),
        ({"properties": {"x": 5}}, ".properties.x"),
        ({"properties": {"x": {"$ref": "#/properties/arguments"}}}, ".properties.x.$ref"),
        ({"properties": {"x": False}, "required": ["x"]}, ""),
        ({"title": 10**50}, ".title"),
    ],
)
@pytest.mark.parametrize("others", [(), ("f",)])
def test_parameters_that_cannot_be_enforced_are_named(
    compiler: GrammarCompiler, stated: dict[str, Any], param: str, others: tuple[str, ...]
) -> None:
    named = {name: Function(name=name, parameters=FUNCTIONS[name]) for name in others}
    named["wrong"] = Function(name="wrong", parameters=stated)
    try:
        documents = {name: parameters(place, one) for place, (name, one) in enumerate(named.items())}
        verdict = judge(compiler, question_of_call(documents, FormLimits()))
        message, found = verdict.error, verdict.param
    except InvalidRequestError as error:
        message, found = error.message, error.param
    assert found == f"tools[{len(others)}].function.parameters{param}"
    assert message is not None
    assert "response_format" not in message
