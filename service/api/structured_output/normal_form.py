"""A conjunction of schemas as branches: each is one type of value, with all that the conjunction says of it.

`allOf`, `$ref` and neighbouring keywords are conjunctions, `anyOf`, `oneOf` and types are alternatives. The parts of
arrays and objects are conjunctions again, named by the indices of their schemas, so that recursion ends. This file
knows no grammar but the terminals in which scalars and names are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import lcm

from service.api.structured_output import terminals
from service.api.structured_output.branches import Array, Branch, Conjunction, Object, Scalar, holds, needed
from service.api.structured_output.keywords import MAX_MULTIPLE, TYPES, is_number, refuse
from service.api.structured_output.number_regex import Range
from service.api.structured_output.schema import ANYTHING, NOTHING, Schema, Schemas
from service.contract.request import FormLimits, GrammarSpec
from service.grammar import GrammarCompiler, GrammarError

_MAX_CONJUNCTIONS = 10_000
_MAX_ALTERNATIVES = 1000  # of one conjunction
_MAX_NAME_KINDS = 64
_MAX_NAME_CHARACTERS = 64  # of a name that the schema does not give; patterns of long ones take long at every token


@dataclass
class NormalForm:
    """The branches of the conjunctions of schemas."""

    schemas: Schemas
    limits: FormLimits
    vocabulary: GrammarCompiler
    _branches: dict[Conjunction, list[Branch]] = field(default_factory=dict)
    _satisfiable: dict[Conjunction, bool] = field(default_factory=dict)
    _one_of: dict[int, None] = field(default_factory=dict)  # schemas with alternatives that must exclude each other

    def branches(self, conjunction: Conjunction) -> list[Branch]:
        """Those of a conjunction; whether something fits each is another question."""
        if conjunction not in self._branches:
            if len(self._branches) >= _MAX_CONJUNCTIONS:
                refuse(self.schemas.path, "has too many combinations of its parts", "simplify it")
            made = [branch for one in self._alternatives(conjunction) for branch in self._merge(one)]
            self._branches[conjunction] = list({repr(branch): branch for branch in made}.values())
        return self._branches[conjunction]

    def is_satisfiable(self, conjunction: Conjunction) -> bool:
        """Whether some finite value fits."""
        if conjunction not in self._satisfiable:
            parts, pending = {conjunction: None}, [conjunction]
            while pending:
                for branch in self.branches(pending.pop()):
                    for part in needed(branch):
                        if part not in parts and part not in self._satisfiable:
                            parts[part] = None
                            pending.append(part)
            fitting: set[Conjunction] = set()

            def fits(part: Conjunction) -> bool:
                return part in fitting or self._satisfiable.get(part, False)

            while more := [
                one
                for one in parts
                if one not in fitting and any(holds(branch, fits) for branch in self._branches[one])
            ]:
                fitting.update(more)
            self._satisfiable |= {one: one in fitting for one in parts}
        return self._satisfiable[conjunction]

    def check_satisfiable(self, conjunction: Conjunction) -> None:
        """Refuses a conjunction that nothing fits, with the path of the part that makes it so."""
        seen: set[Conjunction] = set()
        while not self.is_satisfiable(conjunction):
            seen.add(conjunction)
            parts = {part for branch in self.branches(conjunction) for part in needed(branch)}
            culprits = [part for part in parts if part not in seen and not self.is_satisfiable(part)]
            if len(culprits) != 1 or culprits == [(NOTHING,)] or len(self.branches(conjunction)) != 1:
                refuse(self.schemas.all[conjunction[0]].path, "allows no value at all")
            conjunction = culprits[0]

    def holds(self, branch: Branch) -> bool:
        """Whether some finite value fits a branch."""
        for part in needed(branch):
            self.is_satisfiable(part)
        return holds(branch, self._satisfiable.__getitem__)

    def check_one_of(self) -> None:
        """Refuses what more than one alternative of a `oneOf` allows, of all that has been looked at."""
        for index in [*self._one_of]:
            schema = self.schemas.all[index]
            for options in schema.one_of:
                rest = self.schemas.add(replace(schema, one_of=[one for one in schema.one_of if one is not options]))
                for i, second in enumerate(options):
                    if any(self.is_satisfiable(_joined([rest, first, second])) for first in options[:i]):
                        hint = "let a constant in each tell them apart, or use anyOf"
                        refuse(f"{schema.path}.oneOf.{i}", "may allow what an alternative before it allows", hint)

    # -- alternatives --

    def _alternatives(self, conjunction: Conjunction) -> Iterator[list[Schema]]:
        """The conjunctions without alternatives of which one must hold."""
        pending: list[tuple[Conjunction, list[list[int]], Conjunction]] = [(conjunction, [], ())]
        found = 0
        while pending:
            todo, choices, done = pending.pop()
            if not todo and not choices:
                found += 1
                if found > _MAX_ALTERNATIVES:
                    refuse(self.schemas.all[conjunction[0]].path, "has too many combinations of alternatives")
                yield [self.schemas.all[index] for index in done]
            elif not todo:
                pending += [((option,), choices[1:], done) for option in reversed(choices[0])]
            elif todo[0] in done or todo[0] == ANYTHING:
                pending.append((todo[1:], choices, done))
            elif todo[0] != NOTHING:
                schema = self.schemas.all[todo[0]]
                if schema.one_of:
                    self._one_of[todo[0]] = None
                more = [*choices, *schema.any_of, *schema.one_of]
                pending.append(((*schema.all_of, *todo[1:]), more, (*done, todo[0])))

    def _merge(self, schemas: list[Schema]) -> Iterator[Branch]:
        types = set(TYPES)
        for schema in schemas:
            if schema.types is not None:
                types &= schema.types | ({"integer"} if "number" in schema.types else set())
        values = [schema.values for schema in schemas if schema.values is not None]
        for kind, allowed in (("null", [None]), ("boolean", [True, False])):
            texts = [terminals.constant(one) for one in allowed if kind in types and _is_in(one, values)]
            if texts:
                yield Scalar(kind, terminals.any_of(texts))
        if types & {"integer", "number"}:
            yield from self._numbers(schemas, values, integral="number" not in types)
        if "string" in types:
            yield from self._strings(schemas, values)
        if "array" in types and not values:
            yield self._array(schemas)
        if "object" in types and not values:
            yield from self._object(schemas)

    # -- scalars --

    def _numbers(self, schemas: list[Schema], values: list[list[object]], integral: bool) -> Iterator[Scalar]:
        multiple = lcm(*(schema.multiple for schema in schemas if schema.multiple))
        integral = integral or any(schema.multiple for schema in schemas)
        wanted = Range(integral=integral, digits=self.limits.digits or None)
        for schema in schemas:
            for bound, strict in schema.least:
                wanted = wanted.at_least(bound, strict)
            for bound, strict in schema.most:
                wanted = wanted.at_most(bound, strict)
        if values:
            numbers = [one for one in values[0] if is_number(one) and _is_in(one, values) and wanted.has(one)]
            texts = [terminals.number(one, integral) for one in numbers if multiple == 1 or one % multiple == 0]
            if texts:
                yield Scalar("number", terminals.any_of(texts))
            return
        normal = wanted.normal(multiple)
        if normal is None:
            return
        if multiple == 1:
            yield Scalar("number", terminals.all_of(map(terminals.regex, normal.regexes())))
            return
        path = _path_of(schemas, lambda schema: schema.multiple > 1) + ".multipleOf"
        if multiple > MAX_MULTIPLE:
            refuse(path, f"and others make {multiple} together; at most {MAX_MULTIPLE} is allowed")
        rule = terminals.multiples(normal, multiple)
        if rule is None:
            refuse(path, f"goes only with bounds under {terminals.MAX_EXACT}")
        yield Scalar("number", rule, is_terminal=False)

    def _strings(self, schemas: list[Schema], values: list[list[object]]) -> Iterator[Scalar]:
        least = max((schema.min_length for schema in schemas), default=0)
        mosts = [schema.max_length for schema in schemas if schema.max_length is not None]
        patterns = [terminals.regex(one) for schema in schemas for one in schema.patterns]
        own = self.limits.string_characters
        most = min(mosts) if mosts else max(own, least) if own else None
        if values:
            found = [one for one in values[0] if isinstance(one, str) and _is_in(one, values)]
            texts = [terminals.string(one) for one in found if least <= len(one) <= min([len(one), *mosts])]
            if not texts:
                return
            text = terminals.any_of(texts)
        elif most is not None and most < least:
            return
        else:
            text = terminals.characters(least, most)
        if patterns:
            fitting = terminals.all_of([text, *patterns])
            with _blaming(_path_of(schemas, lambda schema: bool(schema.patterns))):
                if not (values or mosts or self.vocabulary.fits(fitting)):  # the pattern's own bound is over ours
                    fitting = terminals.all_of([terminals.characters(least, None), *patterns])
                if not self.vocabulary.fits(fitting):
                    return
                if not values:
                    self.vocabulary.rehearse(GrammarSpec(grammar=terminals.choice([fitting])))
            text = fitting
        yield Scalar("string", text)

    # -- arrays and objects --

    def _array(self, schemas: list[Schema]) -> Array:
        length = max((len(schema.prefix) for schema in schemas), default=0)
        prefix = [_joined(schema.prefix[i] if i < len(schema.prefix) else schema.items for schema in schemas)
                  for i in range(length)]  # fmt: skip
        least = max((schema.min_items for schema in schemas), default=0)
        most = min((schema.max_items for schema in schemas if schema.max_items is not None), default=None)
        if most is None and self.limits.items:
            most = max(self.limits.items, least, length)
        return Array(prefix, _joined(schema.items for schema in schemas), least, most)

    def _object(self, schemas: list[Schema]) -> Iterator[Object]:
        names = dict.fromkeys(name for schema in schemas for name in schema.properties)
        required = dict.fromkeys(name for schema in schemas for name in schema.required)
        path = _path_of(schemas, lambda schema: bool(schema.by_pattern))
        with _blaming(path):
            named = {name: self._property(schemas, name) for name in [*names, *required]}
        least = max([len(required), *(schema.min_properties for schema in schemas)])
        most = min((schema.max_properties for schema in schemas if schema.max_properties is not None), default=None)
        has_room = most is None or most > len(required)
        with _blaming(path):
            others = self._others(schemas, list(named), path) if has_room and _is_open(schemas, least) else []
        if least > len(named) + 1 and others and (most is None or most >= least):
            path = _path_of(schemas, lambda schema: schema.min_properties == least)
            reason = f"asks for {least} properties, and at most {len(named) + 1} of them can be known to be different"
            refuse(f"{path}.minProperties", reason, "name them in `properties`")
        yield Object(named, frozenset(required), others, least, most)

    def _property(self, schemas: list[Schema], name: str) -> Conjunction:
        text, parts = terminals.string(name), []
        for schema in schemas:
            found = [schema.properties[name]] if name in schema.properties else []
            found += [
                child
                for one, child in schema.by_pattern
                if self.vocabulary.fits(terminals.all_of([text, terminals.regex(one)]))
            ]
            parts += found or [schema.additional or ANYTHING]
            if schema.names != ANYTHING:
                key = self.schemas.equal_to(name, schema.path)
                parts += [] if self.is_satisfiable(_joined([schema.names, key])) else [NOTHING]
        return _joined(parts)

    def _others(self, schemas: list[Schema], taken: list[str], path: str) -> list[tuple[str, Conjunction]]:
        """Properties without a name, by all patterns that their names match and no other."""
        patterns = dict.fromkeys(one for schema in schemas for one, _ in schema.by_pattern)
        own = self.limits.string_characters
        keys = [terminals.characters(0, min(own, _MAX_NAME_CHARACTERS) if own else None)]
        for schema in schemas:
            if schema.names != ANYTHING:
                branches = [
                    one.text
                    for one in self.branches((schema.names,))
                    if isinstance(one, Scalar) and one.kind == "string"
                ]
                if not branches:
                    return []
                keys.append(terminals.any_of(branches))
        kinds: list[tuple[str, ...]] = [()]
        for pattern in patterns:
            kinds += [
                (*kind, pattern)
                for kind in kinds
                if self.vocabulary.fits(terminals.all_of([keys[0], *map(terminals.regex, (*kind, pattern))]))
            ]
            if len(kinds) > _MAX_NAME_KINDS:
                refuse(f"{path}.patternProperties", "has too many patterns that fit the same names")
        found = []
        for kind in kinds:
            part = _joined(
                child
                for schema in schemas
                for child in [child for one, child in schema.by_pattern if one in kind]
                or [schema.additional or ANYTHING]
            )
            excluded = [terminals.string(name) for name in taken]
            excluded += [terminals.regex(one) for one in patterns if one not in kind]
            text = terminals.all_of([*keys, *map(terminals.regex, kind)])
            text = terminals.without(text, excluded)
            if part != (NOTHING,) and ((len(keys) == 1 and not patterns) or self.vocabulary.fits(text)):
                found.append((text, part))
        if patterns and found:
            self.vocabulary.rehearse(GrammarSpec(grammar=terminals.choice([text for text, _ in found])))
        return found


def _path_of(schemas: list[Schema], says: Callable[[Schema], bool]) -> str:
    """The path of the first schema that says something; of the first at all where none does."""
    return next((schema.path for schema in schemas if says(schema)), schemas[0].path if schemas else "")


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Gives what the library refuses a path."""
    try:
        yield
    except GrammarError as error:
        refuse(path, f"is too complex: {error.message}", "simplify its patterns")


def _is_open(schemas: list[Schema], least: int) -> bool:
    """Whether properties without a name may come: where properties are listed and nothing is said of others, none do,
    unless there must be more.
    """
    named = {name for schema in schemas for name in (*schema.properties, *schema.required)}
    are_listed = any(schema.lists_properties for schema in schemas)
    is_said = any(schema.additional is not None or schema.by_pattern or schema.names != ANYTHING for schema in schemas)
    return is_said or not are_listed or least > len(named)


def _joined(indices: Iterable[int]) -> Conjunction:
    found = dict.fromkeys(index for index in indices if index != ANYTHING)
    return (NOTHING,) if NOTHING in found else tuple(found)


def _is_in(value: object, lists: list[list[object]]) -> bool:
    """Whether every list has a value, as JSON compares them: 1 is 1.0, and not true."""
    kind = isinstance(value, bool)
    return all(any(one == value and isinstance(one, bool) == kind for one in values) for values in lists)
