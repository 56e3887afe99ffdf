"""The grammar of a text, as a mask over the vocabulary for every next token. No torch, no HTTP.

llguidance does the work; it is imported where the first grammar is compiled, because few processes need one. A grammar
is compiled once and shared, and each choice moves a `Cursor` of its own through it. What comes next after tokens that
are not accepted yet (drafts) is looked up on a copy: a wrong draft leaves nothing behind.
"""

from __future__ import annotations

import json
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.contract.errors import InvalidRequestError
from service.contract.request import GrammarSpec
from service.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Every way to write a text in tokens is allowed. Where a grammar leaves no choice, the library would else allow only
# the tokens in which the tokenizer writes it, and those may be special ones or lie beyond the model's vocabulary.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_CACHED = 64  # grammars kept, the last used ones
# Of the lexer and the parser, at each step: a mask takes some 30 ms at worst.
_MAX_STATES = 50_000
_MAX_FUEL = 500_000
_MAX_ITEMS = 20_000
_MAX_SYMBOLS = 100_000
# Of a part alone in short texts: that leaves room for long ones, and for what else stands in the grammar.
_REHEARSALS = 4
_REHEARSED_TOKENS = 128
_REHEARSED_STATES = 6_000
_REHEARSED_FUEL = 200_000
# What llguidance adds to its errors: the place, the expression with a line that points into it, the source.
_LISTING = re.compile(r"\n\s*\d+ \|.*", re.DOTALL)
_OF_REGEX = re.compile(
    r"at \d+\(\d+\): invalid regex .*(?:\nerror: |\(in regex\): )(.*?)(?: in regex /.*)?\s*", re.DOTALL
)
_MASKED_TOKENS = 8  # of a text that is taken in again: computing a mask gives the lexer new fuel


class GrammarError(InvalidRequestError):
    """A grammar is at fault. Who knows the field of the request that asks for it names that."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, param="response_format", code="invalid_response_format", hint=hint)


class _LexerError(GrammarError):
    """The lexer of a grammar has as many states as it may have, or a step of it took too long. It is of no more use."""


class Cursor:
    """How far one text has come in its grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._version, self._matcher = grammar.matcher()
        self._accepted: list[int] = []
        self._masks: dict[tuple[int, ...], bytes] = {}  # after these pending tokens
        self._ahead: LLMatcher | None = None  # a copy that has taken in the pending tokens below
        self._taken: tuple[int, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Moves on. Raises GrammarError where the grammar cannot go on."""
        self._accepted.append(token)
        if not self._matcher.consume_token(token):
            self._renew()
        self._masks = {key[1:]: mask for key, mask in self._masks.items() if key[:1] == (token,)}
        self._ahead, self._taken = None, ()

    def allowed(self, pending: Sequence[int] = ()) -> bytes:
        """The tokens that may follow the accepted ones and `pending`, which may be wrong: bit i % 8 of byte i // 8.

        After wrong ones anything may: what is sampled there is never used. Raises GrammarError where the
        grammar is too complex, or no token of the vocabulary fits.
        """
        key = tuple(pending)
        if key not in self._masks:
            try:
                self._masks[key] = self._look(key)
            except _LexerError:
                self._renew()
                self._masks[key] = self._look(key)
        return self._masks[key]

    def fitting(self, tokens: list[int]) -> int:
        """How many of `tokens` the grammar allows, from the first on."""
        return self._matcher.validate_tokens(tokens)

    def _renew(self) -> None:
        """Begins again with an empty lexer. Raises GrammarError where this text alone fills it."""
        self._version, self._matcher = self._grammar.matcher(after=self._version)
        self._ahead, self._taken = None, ()
        for start in range(0, len(self._accepted), _MASKED_TOKENS):
            self._matcher.compute_bitmask()
            if not self._matcher.consume_tokens(self._accepted[start : start + _MASKED_TOKENS]):
                raise _exhausted(self._matcher)

    def _look(self, pending: tuple[int, ...]) -> bytes:
        if not pending:
            return self._mask(self._matcher)
        if self._ahead is None or pending[: len(self._taken)] != self._taken:
            self._ahead, self._taken = self._matcher.deep_copy(), ()
        new = list(pending[len(self._taken) :])
        try:
            if self._ahead.try_consume_tokens(new) == len(new):
                self._taken = pending
                return self._mask(self._ahead)
            if self._ahead.is_error():
                raise _exhausted(self._ahead)
        except _LexerError:
            raise
        except GrammarError:
            pass  # it will be raised again if the text comes here
        self._ahead, self._taken = None, ()
        return self._grammar.anything

    def _mask(self, matcher: LLMatcher) -> bytes:
        mask = self._grammar.cut(matcher.compute_bitmask())
        if matcher.is_error() or not any(mask):
            raise _exhausted(matcher)
        return mask


class Grammar:
    """A compiled grammar. Its cursors share a lexer, which keeps its states; one with too many is replaced."""

    def __init__(self, make: Callable[[], LLMatcher], vocab_size: int) -> None:
        self._make = make
        self._version, self._matcher = 0, make()
        self.anything = ((1 << vocab_size) - 1).to_bytes(-(-vocab_size // 8), "little")  # a mask of all tokens

    def start(self) -> Cursor:
        """A cursor at the beginning."""
        return Cursor(self)

    def cut(self, mask: bytes) -> bytes:
        """A mask without the tokens beyond the model's vocabulary, which are never sampled."""
        size = len(self.anything)
        return mask[: size - 1] + bytes([mask[size - 1] & self.anything[-1]])

    def matcher(self, after: int = -1) -> tuple[int, LLMatcher]:
        """A matcher at the beginning and the version of its lexer, which is a later one than `after`."""
        if after == self._version:
            self._version, self._matcher = self._version + 1, self._make()
        return self._version, self._matcher.deep_copy()


class GrammarCompiler:
    """Structured output to grammars over one vocabulary."""

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None

    def compile(self, form: GrammarSpec) -> Grammar:
        """Raises GrammarError for what is no grammar, is too complex, or fits no text of this vocabulary."""
        source = _source(form)
        grammar = Grammar(lambda: self._matcher(source, _MAX_STATES, _MAX_FUEL), self._vocab_size)
        grammar.start().allowed()
        return grammar

    def fits(self, terminal: str) -> bool:
        """Whether a terminal of a grammar can be written at all. Raises GrammarError for one that is none, or
        is too complex.
        """
        matcher = self._matcher(f"{_OPTIONS}start: TERMINAL\nTERMINAL: {terminal}", _MAX_STATES, _MAX_FUEL)
        matcher.compute_bitmask()
        if matcher.is_error() and not _has_no_text(matcher):
            raise _exhausted(matcher)
        return not matcher.is_error()

    def rehearse(self, form: GrammarSpec) -> None:
        """Writes short texts of a grammar. Raises GrammarError where long ones would be too complex."""
        source = _source(form)
        for seed in range(_REHEARSALS):
            chance = random.Random(seed)
            matcher = self._matcher(source, _REHEARSED_STATES, _REHEARSED_FUEL)
            for _ in range(_REHEARSED_TOKENS):
                mask = matcher.compute_bitmask()
                if matcher.is_error():
                    raise _exhausted(matcher)
                start = chance.randrange(len(mask))
                place = next((one for one in (*range(start, len(mask)), *range(start)) if mask[one]), 0)
                token = 8 * place + mask[place].bit_length() - 1
                if token in self._eos_token_ids or not matcher.consume_token(token) or matcher.is_stopped():
                    break

    def _matcher(self, source: str, max_states: int, max_fuel: int) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            step_lexer_fuel=max_fuel,
            step_max_items=_MAX_ITEMS,
            max_lexer_states=max_states,
            max_grammar_size=_MAX_SYMBOLS,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._load_tokenizer(), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            tokenizer = open_tokenizer(Path(self._tokenizer_path))
            size = max(self._vocab_size, *(id + 1 for id in tokenizer.get_vocab().values()))
            try:
                self._tokenizer = LLTokenizer(tokenizer.to_str(), size, eos_token=self._eos_token_ids or None)
            except ValueError as error:
                raise GrammarError(f"this model's tokenizer cannot be held to structured output: {error}") from None
        return self._tokenizer


class Grammars:
    """The grammars in use; new ones are compiled beside the caller, in a thread. Call it from one thread."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._found: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()

    def find(self, form: GrammarSpec) -> Future[Grammar]:
        """The compiled grammar of a spec, now or soon; its error is GrammarError."""
        found = self._found.pop(form, None)
        if found is None:
            found = self._thread.submit(self._compiler.compile, form)
        self._found[form] = found
        if len(self._found) > _CACHED:
            self._found.popitem(last=False)
        return found


def _source(form: GrammarSpec) -> str:
    """The text that the library compiles."""
    from llguidance import LLMatcher

    if form.grammar is not None:
        return _OPTIONS + form.grammar
    made: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(form.regex or ""))  # which knows what to escape
    return _OPTIONS + str(made["grammars"][0]["lark_grammar"])


def _exhausted(matcher: LLMatcher) -> GrammarError:
    if not matcher.is_error() or _has_no_text(matcher):
        return GrammarError("no text of this model's vocabulary has the form asked for")
    kind = _LexerError if "lexer error" in _reason(matcher) else GrammarError
    return kind(f"the grammar is too complex: {_reason(matcher)}", hint="simplify it")


def _has_no_text(matcher: LLMatcher) -> bool:
    return _reason(matcher).startswith("NoExtension")


def _reason(matcher: LLMatcher) -> str:
    """Return llguidance's message, without its own advice and the grammar, which no caller has written."""
    message = _LISTING.sub("", matcher.get_error().replace("\n<non-verbose/>", ""))
    found = _OF_REGEX.fullmatch(message)
    return " ".join((found[1] if found else message).split())[:300]
