"""Answers of a JSON Schema: drawn from logits that know nothing, along the masks that an engine has, they all fit it.

Oracle: jsonschema, with its formats. Schemas are drawn too, with every keyword that is taken (`tests/support`), and
what must be refused is a small share of them, by reason.
"""

from __future__ import annotations

import datetime
import json
import random
import re
from collections import Counter
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any
from uuid import UUID

import pydantic
import pytest

from service.api.structured_output.keywords import KEYWORDS, NEUTRAL
from service.api.structured_output.lark import schema_grammar
from service.api.structured_output.schema import Document
from service.contract.errors import InvalidRequestError
from service.contract.request import FormLimits, GrammarSpec
from service.grammar import Grammar, GrammarCompiler
from tests.support.random_schemas import REFUSED, VALUES, RandomSchemas, is_valid, keywords, random_text

ROOT = Path(__file__).parents[3]
EOS = 1
SMALL = FormLimits(8, 3, 20)  # so that texts end soon
REASONS = {  # by words of the message: what a schema at random may be refused for
    "allows no value at all": 0.12,
    "refers to itself": 0.06,
    "may allow what an alternative before it allows": 0.03,
    "leaves only numbers of over 40 digits": 0.02,
    "known to be different": 0.02,
    "goes only with bounds under": 0.02,
    "together; at most": 0.01,
    "too complex": 0.02,
    "counts too many": 0.01,
}


class Vocabulary:
    """The demo's, and what its tokens say."""

    def __init__(self) -> None:
        self.compiler = GrammarCompiler(str(ROOT / "model_store/demo/base/tokenizer.json"), 1024, [EOS])
        tokenizer = self.compiler._load_tokenizer()
        self.texts = [tokenizer.decode_bytes([id]) for id in range(1024)]

    def grammar(self, schema: dict[str, Any], limits: FormLimits = SMALL) -> Grammar:
        return self.compiler.compile(
            GrammarSpec(grammar=schema_grammar(Document("schema", schema), limits, self.compiler))
        )

    def answers(self, schema: dict[str, Any], count: int = 4, limits: FormLimits = SMALL, seed: int = 0) -> list[bytes]:
        """Those that have an end; none of them may stop before it."""
        grammar, chance = self.grammar(schema, limits), random.Random(seed)
        drawn = [random_text(grammar.start(), self.texts, EOS, chance) for _ in range(count)]
        return [text for text in drawn if text is not None]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


def reason_of(error: InvalidRequestError, schema: dict[str, Any], seed: int) -> str:
    """Why a schema was refused, one of those that are known; where nothing is said to fit, nothing does."""
    if (error.param or "").rpartition(".")[2] in REFUSED or "look-around" in error.message:
        return "not supported"
    if "no value at all" in error.message and "format" not in set(keywords(schema)):  # jsonschema does not know all
        fitting = [value for value in VALUES if is_valid(schema, json.dumps(value).encode())]
        assert not fitting, f"seed {seed}: {fitting} fit {json.dumps(schema)}"
    return next(words for words in REASONS if words in error.message)


def check_drawn_schemas(vocabulary: Vocabulary, seeds: range) -> tuple[Counter[str], Counter[str]]:
    """Draws schemas and answers; returns how often each keyword was taken, and the reasons of refusals."""
    taken: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    ended = drawn = 0
    for seed in seeds:
        schema = RandomSchemas(seed).draw()
        try:
            answers = vocabulary.answers(schema, 2, SMALL if seed % 3 else FormLimits(), seed)
        except InvalidRequestError as error:
            reasons[reason_of(error, schema, seed)] += 1
            continue
        taken.update(set(keywords(schema)))
        drawn, ended = drawn + 2, ended + len(answers)
        for answer in answers:
            assert is_valid(schema, answer), f"seed {seed}: {answer!r} does not fit {json.dumps(schema)}"
    assert ended > 0.97 * drawn, "many texts have no end: the test shows little"
    return taken, reasons


def test_answers_to_drawn_schemas_fit_them(vocabulary: Vocabulary) -> None:
    taken, reasons = check_drawn_schemas(vocabulary, range(150))
    assert reasons.total() < 50
    assert len(taken) > 40


@pytest.mark.slow
@pytest.mark.parametrize("first", [1_000_000, 2_000_000])
def test_answers_to_thousands_of_schemas_fit_them(vocabulary: Vocabulary, first: int) -> None:
    """No keyword that is documented is always refused, and nothing is refused too often."""
    taken, reasons = check_drawn_schemas(vocabulary, range(first, first + 2000))
    print(f"\n{reasons.total() / 20:.1f} % refused: {dict(reasons)}\ntaken: {dict(sorted(taken.items()))}")
    assert (KEYWORDS | NEUTRAL.keys()) - taken.keys() <= {"$dynamicAnchor", "$vocabulary"}
    for words, share in REASONS.items():
        assert reasons[words] <= share * 2000, words


RIGHT: list[tuple[dict[str, Any], str]] = [  # what is allowed at all, as an expression
    ({"const": 9007199254740993}, "9007199254740993"),
    ({"enum": [-9007199254740993, 18446744073709551617]}, "-9007199254740993|18446744073709551617"),
    ({"type": "integer", "minimum": 9007199254740993, "maximum": 9007199254740994}, "900719925474099[34]"),
    ({"type": "integer", "exclusiveMinimum": 2**63, "exclusiveMaximum": 2**63 + 2}, "9223372036854775809"),
    ({"const": 16.0, "type": "integer"}, "16"),
    ({"type": "integer", "multipleOf": 7.0, "minimum": -8, "maximum": 8}, "-7|0|7"),
    ({"type": "number", "multipleOf": 1, "minimum": 2, "maximum": 3.5}, "2|3"),
    ({"type": "number", "exclusiveMinimum": 0.2, "exclusiveMaximum": 0.3}, r"0\.2[0-9]+"),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 4}, "4"),
    ({"const": "<s>"}, '"<s>"'),
    ({"enum": ["</s>", "<pad>"]}, '"</s>"|"<pad>"'),
    ({"const": 'a"\\\n\x00\x7fé🙂/'}, r'"a\\"\\\\\\n\\u0000\x7fé🙂/"'),
    ({"type": "string", "minLength": 2, "maxLength": 2, "pattern": "^[🙂é]*$"}, '"[🙂é]{2}"'),
    ({"type": "string", "pattern": '^\\\\"?$'}, r'"\\\\(\\")?"'),
    ({"type": "string", "pattern": "^a&&[[]$|^\\/\\-$"}, r'"a&&\["|"/-"'),
    ({"type": "string", "nullable": True, "maxLength": 0}, 'null|""'),
    ({"nullable": True, "type": "string", "enum": ["a"]}, '"a"'),
    ({"type": "string", "nullable": False, "const": "a", "minLength": None, "format": "soup"}, '"a"'),
    ({"const": None}, "null"),
    ({"enum": [1, True, None, "1"], "type": ["boolean", "string"]}, 'true|"1"'),
    ({"const": {"a": [1, {"b": None}]}}, r'\{ ?"a" ?: ?\[ ?1 ?, ?\{ ?"b" ?: ?null ?\} ?\] ?\}'),
    ({"allOf": [{"minimum": 3}, {"maximum": 3}], "type": "number"}, r"3(\.0+)?"),
    ({"anyOf": [{"type": "null"}, False], "allOf": [True]}, "null"),
    ({"oneOf": [{"type": "string", "const": "a"}, {"type": "boolean", "const": True}]}, '"a"|true'),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}, "$id": "https://a.example/s"}, "1"),
    ({"$ref": "#n", "definitions": {"a": {"$anchor": "n", "const": 1}}}, "1"),
    ({"$ref": "https://a.example/s#/x-parts/a", "$id": "https://a.example/s", "x-parts": {"a": {"const": 1}}}, "1"),
    ({"$ref": "#/$defs/a", "const": 2, "$defs": {"a": {"enum": [1, 2]}}}, "2"),
    ({"type": "array", "items": [{"const": 1}], "additionalItems": False, "minItems": 1}, r"\[ ?1 ?\]"),
    ({"type": "array", "prefixItems": [{"const": 1}, False, {"const": 2}], "minItems": 1}, r"\[ ?1 ?\]"),
    ({"type": "array", "items": {"const": 1}, "maxItems": 2.0, "minItems": 2}, r"\[ ?1 ?, ?1 ?\]"),
    ({"type": "array", "items": {"const": 1}, "uniqueItems": True, "maxItems": 1}, r"\[ ?1? ?\]"),
    (
        {"type": "object", "properties": {"a": {"minimum": 3}}, "required": ["a"], "additionalProperties": False,
         "patternProperties": {"^a$": {"type": "integer", "maximum": 3}}},
        r'\{ ?"a" ?: ?3 ?\}',
    ),
    ({"type": "object", "properties": {"a": {"const": 1}}}, r'\{ ?("a" ?: ?1)? ?\}'),
    ({"type": "object", "properties": {}}, r"\{ ? ?\}"),
    ({"type": "object", "properties": None, "maxProperties": 0}, r"\{ ? ?\}"),
    (
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"],
         "anyOf": [{"properties": {"b": {"const": 2}}, "required": ["b"]}], "allOf": [{"required": ["a"]}]},
        r'\{ ?"a" ?: ?1 ?, ?"b" ?: ?2 ?\}',
    ),
    (
        {"type": "object", "properties": {"a": {"const": 1}, "b": False, "c": {"const": 2}}, "minProperties": 2,
         "additionalProperties": False},
        r'\{ ?"a" ?: ?1 ?, ?"c" ?: ?2 ?\}',
    ),
    (
        {"type": "object", "propertyNames": {"enum": ["k"]}, "additionalProperties": {"const": 1}, "minProperties": 1,
         "maxProperties": 1},
        r'\{ ?"k" ?: ?1 ?\}',
    ),
    (
        {"type": "object", "required": ["x"], "additionalProperties": {"const": 1}, "maxProperties": 1},
        r'\{ ?"x" ?: ?1 ?\}',
    ),
    (
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False, "maxProperties": 1},
        r'(\{ ?("next" ?: ?)?)*( ?\})*',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "expected"), RIGHT, ids=lambda value: json.dumps(value)[:70])
def test_what_an_answer_may_be(vocabulary: Vocabulary, schema: dict[str, Any], expected: str) -> None:
    answers = vocabulary.answers(schema)
    assert answers
    for answer in answers:
        assert re.fullmatch(expected, answer.decode()), answer


def test_what_is_required_is_as_good_as_listed(vocabulary: Vocabulary) -> None:
    """It lets no others in."""
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["b", "c"]}
    for answer in vocabulary.answers(schema, 20):
        assert {"b", "c"} <= json.loads(answer).keys() <= {"a", "b", "c"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("date", datetime.date), ("time", datetime.time), ("date-time", datetime.datetime), ("duration", None),
        ("email", None), ("hostname", None), ("ipv4", IPv4Address), ("ipv6", IPv6Address), ("uuid", UUID),
        ("uri", pydantic.AnyUrl),
    ],
)  # fmt: skip
def test_formats_are_what_readers_take(vocabulary: Vocabulary, name: str, kind: Any) -> None:
    """pydantic's, whose days are those that there are; where it has no reader of a format, the texts only end."""
    answers = vocabulary.answers({"type": "string", "format": name}, 40, FormLimits())
    assert len(answers) > 30
    for answer in answers if kind is not None else ():
        pydantic.TypeAdapter(kind).validate_json(answer)


def test_what_has_no_bound_has_ours_and_a_schema_s_own_bound_wins(vocabulary: Vocabulary) -> None:
    limits = FormLimits(string_characters=4, items=2, digits=3)

    def longest(schema: dict[str, Any], limits: FormLimits = limits) -> int:
        return max(len(json.loads(text)) for text in vocabulary.answers(schema, 60, limits))

    assert longest({"type": "string"}) == 4
    assert longest({"type": "string", "pattern": "a"}) == 4
    assert longest({"type": "string", "pattern": "^a{6}$"}) == 6
    assert longest({"type": "string", "minLength": 7}) == 7
    assert longest({"type": "string", "maxLength": 40}) > 4
    assert longest({"type": "array", "items": {"const": 1}}) == 2
    assert longest({"type": "array", "items": {"const": 1}, "minItems": 3}) == 3
    assert longest({"type": "array", "items": {"const": 1}, "maxItems": 30}) > 3
    assert longest({"type": "object", "additionalProperties": {"const": 1}}) <= 2
    assert longest({"type": "array", "items": {"const": 1}}, FormLimits(0, 0, 0)) > 2
    for kind in ("integer", "number"):
        numbers = vocabulary.answers({"type": kind}, 60, limits)
        assert max(len(re.sub(rb"\D", b"", text)) for text in numbers) == 3
    assert all(int(text) >= 10**8 for text in vocabulary.answers({"type": "integer", "minimum": 10**8}, 20, limits))
    assert max(map(len, vocabulary.answers({"type": "integer"}, 60, FormLimits(0, 0, 0)))) > 3
