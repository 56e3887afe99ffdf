"""A JSON Schema as a grammar in llguidance's Lark, of which every text fits the schema.

Properties come in the schema's order, those without a name after the others. At most a space stands between the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from service.api.structured_output import terminals
from service.api.structured_output.branches import Array, Conjunction, Object, Scalar
from service.api.structured_output.keywords import refuse
from service.api.structured_output.normal_form import NormalForm
from service.api.structured_output.schema import Document, Schemas
from service.contract.request import FormLimits
from service.grammar import GrammarCompiler

NAME, ARGUMENTS = "name", "arguments"  # of a call, in this order

_MAX_GRAMMAR_CHARACTERS = 1_000_000
_MAX_STATES = 20_000  # of one object: which property is next, and how many there are
_PUNCTUATION = r"""
OPEN: /\{ ?/
CLOSE: / ?\}/
BEGIN: /\[ ?/
END: / ?\]/
COMMA: / ?, ?/
COLON: / ?: ?/
"""


def schema_grammar(document: Document, limits: FormLimits, vocabulary: GrammarCompiler) -> str:
    """The grammar. Raises InvalidRequestError with the path of what cannot be held."""
    schemas = Schemas([document])
    writer = _Writer(NormalForm(schemas, limits, vocabulary))
    return writer.grammar([writer.value((root,)) for root in schemas.roots])


def calls_grammar(functions: Mapping[str, Document], limits: FormLimits, vocabulary: GrammarCompiler) -> str:
    """The grammar of a call of one of the functions, given with the schemas of their arguments: an object with its name
    and its arguments. Raises as schema_grammar does.
    """
    schemas = Schemas([*functions.values()])
    writer = _Writer(NormalForm(schemas, limits, vocabulary))
    calls = zip(functions, schemas.roots, strict=True)
    return writer.grammar([writer.call(name, (arguments,)) for name, arguments in calls])


class _Writer:
    """Writes a rule for each conjunction that a text can come to."""

    def __init__(self, form: NormalForm) -> None:
        self._form = form
        self._names: dict[Conjunction, str] = {}
        self._terminals: dict[str, str] = {}
        self._pending: list[tuple[Conjunction, str]] = []
        self._rules: list[str] = []

    def value(self, root: Conjunction) -> str:
        """Return the rule that writes a value. Raises InvalidRequestError where there is none."""
        self._form.check_satisfiable(root)
        return self._symbol(root)

    def call(self, name: str, arguments: Conjunction) -> str:
        """Return the rule that writes a call of a function."""
        entries = [(NAME, self._terminal(terminals.string(name))), (ARGUMENTS, self.value(arguments))]
        written = [f"{self._terminal(terminals.string(key))} COLON {value}" for key, value in entries]
        return f"OPEN {' COMMA '.join(written)} CLOSE"

    def grammar(self, starts: Sequence[str]) -> str:
        """The grammar of texts that are written as one of these."""
        while self._pending:
            conjunction, name = self._pending.pop()
            self._rule(name, self._options(name, conjunction))
        self._form.check_one_of()
        written = [f"{name}: {text}" for text, name in self._terminals.items()]
        grammar = "\n".join([f"start: {' | '.join(starts)}", _PUNCTUATION.strip(), *written, *self._rules])
        if len(grammar) > _MAX_GRAMMAR_CHARACTERS:
            reason = f"makes a grammar of {len(grammar)} characters; at most {_MAX_GRAMMAR_CHARACTERS} are allowed"
            refuse(self._form.schemas.path, reason, "simplify it")
        return grammar

    def _symbol(self, conjunction: Conjunction) -> str:
        """The name of a conjunction's terminal or rule."""
        if conjunction not in self._names:
            branches = self._form.branches(conjunction)
            scalars = [branch for branch in branches if isinstance(branch, Scalar) and branch.is_terminal]
            if len(scalars) == len(branches):
                self._names[conjunction] = self._terminal(terminals.any_of(one.text for one in scalars))
            else:
                name = self._names[conjunction] = f"v{len(self._names)}"
                self._pending.append((conjunction, name))
        return self._names[conjunction]

    def _terminal(self, text: str) -> str:
        return self._terminals.setdefault(text, f"T{len(self._terminals)}")

    def _rule(self, name: str, options: Iterable[str]) -> str:
        self._rules.append(f"{name}: {' | '.join(dict.fromkeys(options))}")
        return name

    def _options(self, name: str, conjunction: Conjunction) -> list[str]:
        branches = [branch for branch in self._form.branches(conjunction) if self._form.holds(branch)]
        scalars = [branch.text for branch in branches if isinstance(branch, Scalar) and branch.is_terminal]
        options = [self._terminal(terminals.any_of(scalars))] if scalars else []
        for number, branch in enumerate(branches):
            prefix = f"{name}_{number}"
            if isinstance(branch, Array):
                options.append(self._array(prefix, branch))
            elif isinstance(branch, Object):
                options.append(self._object(prefix, branch))
            elif not branch.is_terminal:
                options.append(branch.text)
        return options

    def _array(self, prefix: str, array: Array) -> str:
        items = array.prefix
        most = array.most
        for i, part in enumerate([*array.prefix, array.tail]):
            if not self._form.is_satisfiable(part):
                items, most = array.prefix[:i], i if most is None else min(i, most)
                break
        items = items[:most]
        left = None if most is None else most - len(items)
        rest = ""  # of the rules behind the item that is written, from the last to the first
        if left != 0:
            tail, least = self._symbol(array.tail), max(0, array.least - len(items))
            if items:
                rest = self._rule(f"{prefix}_tail", [_repeated(f"COMMA {tail}", least, left)])
            else:
                more = _repeated(f"COMMA {tail}", max(0, least - 1), None if left is None else left - 1)
                rest = self._rule(f"{prefix}_tail", [f"{tail} {more}", *([] if least else ['""'])])
        for i in reversed(range(len(items))):
            item = f"{'COMMA ' if i else ''}{self._symbol(items[i])} {rest}"
            rest = self._rule(f"{prefix}_{i}", [item, *([] if i < array.least else ['""'])])
        return f"BEGIN {rest} END"

    def _object(self, prefix: str, object_: Object) -> str:
        """A rule for each property that may be next and number of properties so far, counted as far as it matters."""
        named = [(name, part) for name, part in object_.named.items() if self._form.is_satisfiable(part)]
        others = [(text, part) for text, part in object_.others if self._form.is_satisfiable(part)]
        most = None if object_.most is None or (object_.most >= len(named) and not others) else object_.most
        counted = min(max(1, object_.least) if most is None else most, max(1, len(named)))
        if (len(named) + 1) * (counted + 1) > _MAX_STATES:
            refuse(self._form.schemas.path, "counts too many properties", "leave minProperties or maxProperties out")
        if others:
            entries = [f"{self._terminal(text)} COLON {self._symbol(part)}" for text, part in others]
            self._rule(f"{prefix}_other", entries)
        after = [self._others(prefix, bool(others), count, object_.least, most) for count in range(counted + 1)]
        for i, (name, part) in reversed([*enumerate(named)]):
            rules: list[str | None] = []
            for count in range(counted + 1):
                then = after[min(count + 1, counted)] if count != most else None
                options = [] if name in object_.required or after[count] is None else [str(after[count])]
                if then is not None:
                    comma = "COMMA " if count else ""
                    options.append(f"{comma}{self._terminal(terminals.string(name))} COLON {self._symbol(part)} {then}")
                rules.append(self._rule(f"{prefix}_{i}_{count}", options) if options else None)
            after = rules
        return f"OPEN {after[0]} CLOSE"

    def _others(self, prefix: str, are_allowed: bool, count: int, least: int, most: int | None) -> str | None:
        """The rule for properties without a name after `count` others; None: they would be too few.

        Nothing keeps two of them from having the same name, so that they count as one.
        """
        missing = least - count
        limit = self._form.limits.items or None if most is None else most - count
        if not are_allowed or limit == 0:
            return None if missing > 0 else '""'
        if missing > 1:
            return None
        entry, name = f"{prefix}_other", f"{prefix}_others_{count}"
        if count:
            return self._rule(name, [_repeated(f"COMMA {entry}", max(0, missing), limit)])
        more = _repeated(f"COMMA {entry}", 0, None if limit is None else limit - 1)
        return self._rule(name, [f"{entry} {more}", *([] if missing > 0 else ['""'])])


def _repeated(text: str, least: int, most: int | None) -> str:
    """A sequence of so many of them."""
    if most == 0:
        return '""'
    return f"({text}){{{least},{'' if most is None else most}}}"
