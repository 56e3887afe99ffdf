"""JSON Schemas and answers at random: every keyword that is taken, in all the company that it may keep.

The answers come from a cursor as an engine's do, from logits that know nothing; the end is a little likelier, so that
most texts have one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema

from service.grammar import Cursor

NAMES = ["a", "b", "c", "é", "a b", "<s>", 'x"y', "\\", "\n", "\x00", "🙂", "ab", "a1", "__proto__"]
NUMBERS = [0, 1, -1, 2, 5, 12, 100, -40, 0.5, -0.25, 0.1, 1.0, 16.0, 1e-7, 3.14, 1e23, 2**53 + 1, -(2**53) - 1,
           2**63 + 1, 12345678901234567890, 1e300, -1e300, -0.0]  # fmt: skip
STRINGS = ["", "a", "abc", "é", "🙂🙂", 'say "no"', "back\\slash", "\n", "\x00\x1f", "\x7f", "\u2028", "<s>", "</s>",
           "<pad>", "2024-02-29", "12", "ab1", "/", "a/b"]  # fmt: skip
PATTERNS = ["^[a-c]{1,3}$", "^\\d+$", "a", "^x|y$", "^(?:ab|c)+$", "^[^\"a]{2}$", "\\\\", "^\\S+$", "^.{0,4}$",
            "^[\\w.-]+@b$", "^\\p{L}+$", "^a", "1$", "^[A-Z]\\s?[0-9]{2,4}$", "^[\\]\\[]+$", "^/x/$", "^\\W\\D$",
            "^$"]  # fmt: skip
FORMATS = ["date", "time", "date-time", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "duration", "soup", "int32"]
VALUES = [None, True, False, *NUMBERS, *STRINGS, [], [None], [1], ["a", "b"], {}, {"a": 1}, {"a": "a"}, {"a": None},
          {"kind": "u"}, {"kind": "v"}, {"a": {}, "b": {}}, {"extra": 1}]  # fmt: skip
NOTES: dict[str, Any] = {
    "title": "t", "description": "d", "default": 3, "example": None, "examples": [1], "deprecated": True,
    "readOnly": True, "writeOnly": False, "$comment": "c", "x-order": {"type": "no schema"}, "nullable": False,
    "uniqueItems": False, "contentMediaType": "text/plain", "contentEncoding": "base64", "unevaluatedProperties": True,
    "dependentRequired": {}, "format": "soup", "pattern": None, "maxLength": None, "enum": None,
    "propertyNames": {"type": "string"},
    "discriminator": {"propertyName": "a"}, "externalDocs": {"url": "u"}, "allOf": [], "not": None, "minContains": 2,
    "maxContains": 3, "xml": {"name": "a"}, "contentSchema": {"type": "null"}, "unevaluatedItems": {},
    "dependentSchemas": {}, "dependencies": {}, "id": "i",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "not": {"type": "null"}, "uniqueItems": True, "contains": {"const": 1}, "if": {"type": "null"}, "multipleOf": 0.1,
    "unevaluatedProperties": False, "dependentRequired": {"a": ["b"]}, "pattern": "(?=a)", "maxLenght": 3,
}  # fmt: skip


_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = (
    "items",
    "additionalItems",
    "prefixItems",
    "additionalProperties",
    "propertyNames",
    "anyOf",
    "oneOf",
    "allOf",
)


class RandomSchemas:
    """Schemas from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._is_draft_7 = self._chance(0.15)
        self._definitions = "definitions" if self._is_draft_7 else "$defs"

    def draw(self) -> dict[str, Any]:
        """A schema, mostly one that some value fits."""
        schema: Any = None
        while not isinstance(schema, dict):
            schema = self._schema(3)
        schema[self._definitions] = {name: self._schema(1) for name in ("x", "y")}
        if self._is_draft_7:
            schema["$schema"] = "http://json-schema.org/draft-07/schema#"
        else:
            schema["$defs"]["z"] = {"$anchor": "here", **self._scalar(0)}
        if self._chance(0.1):
            schema["$id"] = "https://example.org/root"
        return schema

    def _chance(self, chance: float) -> bool:
        return self._random.random() < chance

    def _some(self, values: list[Any], most: int = 3) -> list[Any]:
        return self._random.sample(values, self._random.randint(0, min(most, len(values))))

    def _schema(self, depth: int) -> Any:
        if self._chance(0.04):
            return self._random.choice([True, True, False, {}])
        kinds: list[tuple[Callable[[int], dict[str, Any]], int]] = [
            (self._string, 4), (self._number, 5), (self._constant, 3), (self._scalar, 2),
        ]  # fmt: skip
        if depth > 0:
            kinds += [(self._object, 8), (self._array, 5), (self._any_of, 2), (self._one_of, 2), (self._all_of, 2),
                      (self._reference, 2), (self._untyped, 1)]  # fmt: skip
        [kind] = self._random.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        schema = kind(depth)
        if self._chance(0.25):
            for name in self._some(list(NOTES), 2):
                schema.setdefault(name, NOTES[name])
        if self._chance(0.01):
            name = self._random.choice(list(REFUSED))
            schema[name] = REFUSED[name]
        items = list(schema.items())
        if self._chance(0.3):
            self._random.shuffle(items)
        return dict(items)

    def _scalar(self, depth: int) -> dict[str, Any]:
        types = ["null", "boolean", "string", "integer", "number"]
        kind: Any = self._random.choice(types) if self._chance(0.6) else self._random.sample(types, 2)
        return {"type": kind} | ({"nullable": True} if self._chance(0.3) else {})

    def _string(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        if self._chance(0.4):
            schema["maxLength"] = self._random.choice([0, 1, 3, 5.0, 20, 2**31])
        if self._chance(0.3):
            schema["minLength"] = self._random.choice([0, 1, 2, 3.0])
        if self._chance(0.3):
            schema["pattern"] = self._random.choice(PATTERNS)
        if self._chance(0.2):
            schema["format"] = self._random.choice(FORMATS)
        return schema

    def _number(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": self._random.choice(["integer", "number"])}
        bounds = sorted(self._random.sample(NUMBERS, 2))
        if self._chance(0.4):
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = bounds[0]
        if self._chance(0.4):
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = bounds[1]
        if self._chance(0.2):
            schema["multipleOf"] = self._random.choice([1, 2, 3.0, 7, 10, 60])
        return schema

    def _value(self, depth: int) -> Any:
        kind = self._random.randrange(7 if depth else 5)
        if kind == 5:
            return [self._value(depth - 1) for _ in range(self._random.randint(0, 3))]
        if kind == 6:
            return {name: self._value(depth - 1) for name in self._some(NAMES)}
        return self._random.choice([STRINGS, STRINGS, NUMBERS, NUMBERS, [None, True, False]][kind])

    def _constant(self, depth: int) -> dict[str, Any]:
        if self._chance(0.5):
            return {"const": self._value(2)}
        values = [self._value(1) for _ in range(self._random.randint(1, 4))]
        schema: dict[str, Any] = {"enum": values}
        if self._chance(0.2):
            schema |= self._string(0) | {"type": ["string", "number", "null"]}
        if self._chance(0.2):
            schema["minimum"] = self._random.choice(NUMBERS)
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array"}
        if self._chance(0.75):
            schema["items"] = self._schema(depth - 1)
        if self._chance(0.3):
            first = [self._schema(depth - 1) for _ in range(self._random.randint(1, 3))]
            if self._is_draft_7 and self._chance(0.7):
                schema |= {"items": first, "additionalItems": schema.get("items", True)}
            else:
                schema["prefixItems"] = first
        if self._chance(0.4):
            schema["maxItems"] = self._random.choice([0, 1, 2, 4.0, 40])
        if self._chance(0.3):
            schema["minItems"] = self._random.choice([0, 1, 2])
        if self._chance(0.05):
            schema["uniqueItems"], schema["maxItems"] = True, 1
        return schema

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._some(NAMES, 4)
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._schema(depth - 1) for name in names}}
        if self._chance(0.6):
            schema["required"] = self._some(names) + (["extra"] if self._chance(0.1) else [])
        if self._chance(0.6):
            schema["additionalProperties"] = False if self._chance(0.5) else self._schema(depth - 1)
        if self._chance(0.25):
            patterns = self._random.sample(PATTERNS, self._random.randint(1, 2))
            schema["patternProperties"] = {pattern: self._schema(depth - 1) for pattern in patterns}
        if self._chance(0.15):
            schema["minProperties"] = self._random.choice([0, 1, 1, 2])
        if self._chance(0.15):
            schema["maxProperties"] = self._random.choice([0, 1, 2, 3.0, 50])
        if self._chance(0.1):
            schema["propertyNames"] = self._random.choice([True, self._string(0), {"enum": ["a", "b", "zz"]}])
        return schema

    def _any_of(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"anyOf": [self._schema(depth - 1) for _ in range(self._random.randint(1, 3))]}
        if self._chance(0.3):
            schema |= self._random.choice([self._object, self._array, self._number, self._string])(depth - 1)
        return schema

    def _one_of(self, depth: int) -> dict[str, Any]:
        if self._chance(0.3):  # as it comes: often two alternatives fit the same value
            return {"oneOf": [self._schema(depth - 1) for _ in range(2)]}
        if self._chance(0.4):
            types = self._random.sample(["null", "boolean", "string", "number", "array"], 2)
            return {"oneOf": [{"type": one} | ({"items": False} if one == "array" else {}) for one in types]}
        options = []
        for tag in ("u", "v"):
            option = self._object(depth)
            option["properties"]["kind"] = {"const": tag}
            option["required"] = [*option.get("required", []), "kind"]
            options.append(option)
        return {"oneOf": options}

    def _all_of(self, depth: int) -> dict[str, Any]:
        kind = self._random.choice([self._object, self._object, self._array, self._number, self._string])
        schema: dict[str, Any] = {"allOf": [kind(depth - 1) for _ in range(self._random.randint(1, 2))]}
        return schema | (kind(depth - 1) if self._chance(0.5) else {})

    def _reference(self, depth: int) -> dict[str, Any]:
        targets = [f"#/{self._definitions}/x", f"#/{self._definitions}/y", "#"]
        schema: dict[str, Any] = {"$ref": self._random.choice(targets)}
        if not self._is_draft_7 and self._chance(0.2):
            schema = {"$ref": "#here"}
        if self._chance(0.5):  # where recursion may end
            return {"type": "array", "items": schema, "maxItems": 2}
        return schema | (self._string(0) if self._chance(0.2) and not self._is_draft_7 else {})

    def _untyped(self, depth: int) -> dict[str, Any]:
        schema = self._random.choice([self._object, self._array, self._number, self._string])(depth - 1)
        return {name: value for name, value in schema.items() if name != "type"}


def random_text(cursor: Cursor, texts: list[bytes], eos: int, chance: random.Random, most: int = 400) -> bytes | None:
    """A text from random choices among what a cursor allows; None where it has no end after so many tokens.

    Raises InvalidRequestError where it cannot go on.
    """
    found = []
    for _ in range(most):
        mask = cursor.allowed()
        allowed = [id for id in range(len(texts)) if mask[id // 8] >> id % 8 & 1]
        if eos in allowed and (len(allowed) == 1 or chance.random() < 0.5):
            break
        closing = [id for id in allowed if texts[id][:1] in (b'"', b"]", b"}", b" ") and id != eos]
        pool = closing if closing and chance.random() < 0.4 else [id for id in allowed if id != eos]
        token = chance.choice(pool)
        cursor.accept(token)
        found.append(texts[token])
        if cursor.finished:
            break
    else:
        return None
    return b"".join(found)


def is_valid(schema: dict[str, Any], text: bytes) -> bool:
    """Whether jsonschema accepts an answer, formats included, whichever of two equal names a reader keeps."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator = kind(plain(schema), format_checker=kind.FORMAT_CHECKER)

    def first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(reversed(pairs))

    return all(validator.is_valid(json.loads(text, object_pairs_hook=hook)) for hook in (dict, first))


def plain(schema: Any) -> Any:
    """The same in JSON Schema's own words: without keywords at null, and OpenAPI's `nullable` as a type."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for name, value in schema.items():
        if name in ("const", "enum", "default", "example", "examples"):
            made |= {} if value is None and name == "enum" else {name: value}
        elif name in _MAPS:
            named = {_in_python(key) if name == "patternProperties" else key: one for key, one in value.items()}
            made[name] = {key: plain(one) for key, one in named.items()}
        elif name == "pattern" and value is not None:
            made[name] = _in_python(value)
        elif value is not None and value != []:
            made[name] = plain(value)
    if schema.get("nullable") is True and "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        made["type"] = [*types, *(["null"] if "null" not in types else [])]
    return made


def _in_python(pattern: str) -> str:
    """An expression of ECMAScript as Python's `re` takes it: there, $ also stands before a last line break."""
    return pattern.replace("\\p{L}", "[^\\W\\d_]").replace("$", "\\Z")


def keywords(schema: Any) -> Iterator[str]:
    """Every keyword in a schema, as often as it is there."""
    if isinstance(schema, list):
        for one in schema:
            yield from keywords(one)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            yield name
            if name in _MAPS:
                yield from (found for one in value.values() for found in keywords(one))
            elif name in _SCHEMAS:
                yield from keywords(value)
