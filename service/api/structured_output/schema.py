"""A JSON Schema read once: every keyword checked, every name resolved, one `Schema` for each schema within it.

Whatever the schema says that cannot be held is refused here, with its path. What a schema and another one mean together
is `normal_form.py`. This file knows no grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.api.structured_output.formats import FORMATS
from service.api.structured_output.keywords import (
    COUNTS,
    LISTS,
    MAPS,
    MAX_ALL_PROPERTIES,
    MAX_COUNT,
    MAX_PROPERTIES,
    NOTES,
    ONE,
    TOOLS,
    TYPES,
    Number,
    refuse,
    says_something,
    shown,
)
from service.api.structured_output.number_regex import is_too_long
from service.api.structured_output.pattern_regex import PatternError, pattern_regex
from service.api.structured_output.regex_size import check_regex_size

ANYTHING, NOTHING = 0, 1  # the schemas true and false
_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07", "2019-09")
_CLASS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)  # of ECMAScript, in which [[] is one; or an escape


@dataclass
class Schema:
    """One schema; other schemas are indices. None, and what is empty, say nothing."""

    path: str
    types: frozenset[str] | None = None
    values: list[Any] | None = None  # of which one must be equal; none of them an array or an object
    all_of: list[int] = field(default_factory=list)
    any_of: list[list[int]] = field(default_factory=list)  # one of each
    one_of: list[list[int]] = field(default_factory=list)  # exactly one of each
    least: list[tuple[Number, bool]] = field(default_factory=list)  # bounds, and whether they are excluded
    most: list[tuple[Number, bool]] = field(default_factory=list)
    multiple: int = 0
    patterns: list[str] = field(default_factory=list)  # expressions of `pattern_regex`
    min_length: int = 0
    max_length: int | None = None
    prefix: list[int] = field(default_factory=list)
    items: int = ANYTHING
    min_items: int = 0
    max_items: int | None = None
    properties: dict[str, int] = field(default_factory=dict)
    lists_properties: bool = False  # also where the list is empty
    by_pattern: list[tuple[str, int]] = field(default_factory=list)  # with the expression of their names
    additional: int | None = None
    names: int = ANYTHING
    required: list[str] = field(default_factory=list)
    min_properties: int = 0
    max_properties: int | None = None


@dataclass(frozen=True)
class Document:
    """A schema as it was sent: its references are to itself alone."""

    path: str  # in the request, for errors
    schema: dict[str, Any]


class Schemas:
    """All schemas within some documents, which share nothing but the grammar that is made of them."""

    def __init__(self, documents: Sequence[Document]) -> None:
        """Raises InvalidRequestError for what cannot be held."""
        self.path = documents[0].path if len(documents) == 1 else TOOLS  # of what they are together
        self.all: list[Schema] = [Schema(self.path), Schema(self.path, types=frozenset())]
        readers = [_Reader(self, document) for document in documents]
        self.roots = [reader.root for reader in readers]
        properties = sum(reader.properties for reader in readers)
        if properties > MAX_ALL_PROPERTIES:
            refuse(self.path, f"have {properties} properties in all; at most {MAX_ALL_PROPERTIES} are allowed")
        self._check_circles()

    def add(self, schema: Schema) -> int:
        """The index of one more schema."""
        self.all.append(schema)
        return len(self.all) - 1

    def equal_to(self, value: Any, path: str) -> int:
        """The schema of one value."""
        if isinstance(value, list):
            made = Schema(path, frozenset({"array"}), prefix=[self.equal_to(one, path) for one in value])
            made.items, made.min_items, made.max_items = NOTHING, len(value), len(value)
        elif isinstance(value, dict):
            properties = {name: self.equal_to(one, path) for name, one in value.items()}
            made = Schema(path, frozenset({"object"}), properties=properties, required=[*value], additional=NOTHING)
        else:
            made = Schema(path, values=[value])
        return self.add(made)

    def _check_circles(self) -> None:
        """Refuses schemas that are their own part before a value begins: they say nothing."""
        done: set[int] = set()
        for start in range(len(self.all)):
            open_: dict[int, Iterator[int]] = {}
            current = start
            while current not in done:
                children = open_.setdefault(current, self._in_place(current))
                child = next((one for one in children if one not in done), None)
                if child in open_:
                    refuse(self.all[current].path, "refers to itself, and no text fits that")
                if child is None:
                    done.add(current)
                    del open_[current]
                    child = next(reversed(open_), current)
                current = child

    def _in_place(self, index: int) -> Iterator[int]:
        schema = self.all[index]
        yield from schema.all_of
        for options in (*schema.any_of, *schema.one_of):
            yield from options


class _Reader:
    """Reads one document; `root` is its own schema."""

    def __init__(self, schemas: Schemas, document: Document) -> None:
        self.properties = 0
        self._all = schemas.all
        self._schemas = schemas
        self._document = document
        self._is_old = any(draft in str(document.schema.get("$schema")) for draft in _OLD_DRAFTS)
        self._indices: dict[int, int] = {}  # by identity
        self._anchors: dict[str, Any] = {}
        self._refs: list[tuple[int, str, str]] = []
        self.root = self._read(document.schema, document.path, within_id=True)
        while self._refs:
            index, path, ref = self._refs.pop()
            self._all[index].all_of.insert(0, self._resolve(ref, path))
        if self.properties > MAX_PROPERTIES:
            reason = f"has {self.properties} properties in all; at most {MAX_PROPERTIES} are allowed"
            refuse(document.path, reason)

    def _read(self, raw: Any, path: str, within_id: bool) -> int:
        if isinstance(raw, bool):
            return ANYTHING if raw else NOTHING
        if not isinstance(raw, dict):
            refuse(path, "is not a schema: an object, true or false")
        if id(raw) in self._indices:
            return self._indices[id(raw)]
        given = {name: value for name, value in raw.items() if value is not None or name in ("const", *NOTES)}
        index = self._indices[id(raw)] = self._schemas.add(Schema(path))
        for name, value in [*given.items()]:
            if not says_something(name, value, given, path):
                del given[name]
        if isinstance(given.get("$anchor"), str):
            self._anchors[given["$anchor"]] = raw
        if "$id" in given and raw is not self._document.schema:
            within_id = False
        if "$ref" in given:
            if not within_id:
                refuse(f"{path}.$ref", "stands under an `$id` of its own", "leave that `$id` out")
            self._refs.append((index, f"{path}.$ref", given["$ref"]))
        self._fill(index, given, self._children(given, path, within_id))
        return index

    def _children(self, given: dict[str, Any], path: str, within_id: bool) -> dict[str, Any]:
        """The indices of the schemas under each keyword that has some."""
        found: dict[str, Any] = {}
        for name in ONE | LISTS | MAPS:
            value, place = given.get(name), f"{path}.{name}"
            if name not in given:
                continue
            if name in MAPS:
                if not isinstance(value, dict):
                    refuse(place, "must be an object of schemas")
                self.properties += len(value) if "roperties" in name else 0
                found[name] = {key: self._read(one, f"{place}.{shown(key)}", within_id) for key, one in value.items()}
            elif name in LISTS or (name == "items" and isinstance(value, list)):
                if not isinstance(value, list):
                    refuse(place, "must be a list of schemas")
                found[name] = [self._read(one, f"{place}.{i}", within_id) for i, one in enumerate(value)]
            else:
                found[name] = self._read(value, place, within_id)
        return found

    def _fill(self, index: int, given: dict[str, Any], children: dict[str, Any]) -> None:
        schema = self._all[index]
        path = schema.path
        if "type" in given:
            schema.types = _types(given["type"], given.get("nullable", False), f"{path}.type")
        schema.all_of = children.get("allOf", [])
        schema.any_of = [children["anyOf"]] if children.get("anyOf") else []
        schema.one_of = [children["oneOf"]] if children.get("oneOf") else []
        if "const" in given:
            self._fill_values(schema, [given["const"]], f"{path}.const")
        if "enum" in given:
            self._fill_values(schema, given["enum"], f"{path}.enum")
        schema.least, schema.most, schema.multiple = _bounds(given, path)
        schema.patterns = list(_patterns(given, path))
        counts = {name: min(int(given[name]), MAX_COUNT) for name in COUNTS & given.keys()}
        schema.min_length, schema.max_length = counts.get("minLength", 0), counts.get("maxLength")
        schema.min_items, schema.max_items = counts.get("minItems", 0), counts.get("maxItems")
        schema.min_properties, schema.max_properties = counts.get("minProperties", 0), counts.get("maxProperties")
        items = children.get("items", ANYTHING)
        if isinstance(items, list):  # as before draft 2020-12
            schema.prefix, schema.items = items, children.get("additionalItems", ANYTHING)
        else:
            schema.prefix, schema.items = children.get("prefixItems", []), items
            if self._is_old and items != ANYTHING:  # `items` is said of all of them, where `prefixItems` is unknown
                schema.prefix = [self._schemas.add(Schema(path, all_of=[one, items])) for one in schema.prefix]
        schema.properties, schema.lists_properties = children.get("properties", {}), "properties" in children
        schema.by_pattern = [
            (_pattern(pattern, f"{path}.patternProperties.{shown(pattern)}"), child)
            for pattern, child in children.get("patternProperties", {}).items()
        ]
        schema.additional = children.get("additionalProperties")
        schema.names = children.get("propertyNames", ANYTHING)
        schema.required = given.get("required", [])

    def _fill_values(self, schema: Schema, values: list[Any], path: str) -> None:
        compound = [self._schemas.equal_to(one, path) for one in values if isinstance(one, list | dict)]
        scalars = self._schemas.add(Schema(path, values=[one for one in values if not isinstance(one, list | dict)]))
        schema.any_of.append([scalars, *compound])

    def _resolve(self, ref: str, path: str) -> int:
        base = self._document.schema.get("$id")
        where = ref.removeprefix(base.rstrip("#")) if isinstance(base, str) and base.rstrip("#") else ref
        target: Any = self._document.schema
        if where[1:] in self._anchors and where[:1] == "#":
            target = self._anchors[where[1:]]
        elif where not in ("", "#") and not where.startswith("#/"):
            refuse(path, f"is {shown(ref)!r}, which is not within the schema")
        else:
            for name in where.split("/")[1:]:
                name = _unescaped(name)
                if isinstance(target, dict) and name in target:
                    target = target[name]
                elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                    target = target[int(name)]
                else:
                    refuse(path, f"is {shown(ref)!r}, which the schema does not have")
        place = "." + where[2:].replace("/", ".") if where[2:] else ""
        return self._read(target, self._document.path + place, within_id=True)


def _unescaped(name: str) -> str:
    """A part of a JSON pointer within a URI."""
    plain = re.sub("%([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), name)
    return plain.replace("~1", "/").replace("~0", "~")


def _types(given: Any, nullable: bool, path: str) -> frozenset[str]:
    names = given if isinstance(given, list) else [given]
    for name in names:
        if not isinstance(name, str) or name not in TYPES:
            refuse(path, f"has {name!r:.60}; the types are {', '.join(sorted(TYPES))}")
    return frozenset([*names, *(["null"] if nullable else [])])


def _bounds(given: dict[str, Any], path: str) -> tuple[list[tuple[Number, bool]], list[tuple[Number, bool]], int]:
    least: list[tuple[Number, bool]] = []
    most: list[tuple[Number, bool]] = []
    for found, plain, strict, sign in (
        (least, "minimum", "exclusiveMinimum", 1),
        (most, "maximum", "exclusiveMaximum", -1),
    ):
        if plain in given:
            found.append((given[plain], given.get(strict) is True))  # true is draft 4's
        if strict in given and not isinstance(given[strict], bool):
            found.append((given[strict], True))
        if any(is_too_long(bound) and bound * sign > 0 for bound, _ in found):
            refuse(f"{path}.{plain}", "leaves only numbers of over 40 digits")
    return least, most, int(given.get("multipleOf", 0))


def _patterns(given: dict[str, Any], path: str) -> Iterator[str]:
    if "pattern" in given:
        yield _pattern(given["pattern"], f"{path}.pattern")
    if given.get("format") in FORMATS:
        yield pattern_regex(FORMATS[given["format"]])


def _pattern(pattern: str, path: str) -> str:
    check_regex_size(_CLASS.sub(lambda match: "." if match[0][0] == "[" else match[0], pattern), path)
    try:
        return pattern_regex(pattern)
    except PatternError as error:
        refuse(path, str(error))
