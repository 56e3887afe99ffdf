"""Grammars for structured output: a mask over the vocabulary for every next token. No torch, no HTTP.

llguidance does the work; it is imported when the first grammar is compiled, because few processes need it. A grammar is
compiled once and shared, and every choice has a `Cursor` of its own. Masks after drafts, which are not accepted yet,
are computed on a copy of the cursor's matcher, so that a wrong draft changes nothing.
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

# Allows every tokenization of a text. Otherwise, where a grammar leaves no choice, llguidance would allow only the
# tokenizer's own tokenization, whose tokens may be special, or outside of the model's vocabulary.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_MAX_CACHED = 64  # grammars; the least recently used is dropped
# Limits of lexer and parser per step: with them, a mask takes some 30 ms at worst.
_MAX_STATES = 50_000
_MAX_FUEL = 500_000
_MAX_ITEMS = 20_000
_MAX_SYMBOLS = 100_000
# Lower limits for a part of a grammar in short texts, which leave room for long texts and for the other parts.
_REHEARSALS = 4
_REHEARSED_TOKENS = 128
_REHEARSED_STATES = 6_000
_REHEARSED_FUEL = 200_000
# The parts of llguidance's errors that are removed: position, expression with a pointer into it, source.
_LISTING = re.compile(r"\n\s*\d+ \|.*", re.DOTALL)
_OF_REGEX = re.compile(
    r"at \d+\(\d+\): invalid regex .*(?:\nerror: |\(in regex\): )(.*?)(?: in regex /.*)?\s*", re.DOTALL
)
_MASKED_TOKENS = 8  # between masks when a text is consumed again: computing a mask gives the lexer new fuel


class GrammarError(InvalidRequestError):
    """A grammar is invalid or too complex. `param` is replaced where the request's field is known."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, param="response_format", code="invalid_response_format", hint=hint)


class _LexerError(GrammarError):
    """The lexer of a grammar has reached its limit of states, or a step took too long. It cannot be used any more."""


class Cursor:
    """The state of one text in its grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._version, self._matcher = grammar.matcher()
        self._accepted: list[int] = []
        self._masks: dict[tuple[int, ...], bytes] = {}  # by pending tokens
        self._ahead: LLMatcher | None = None  # a copy that has consumed the pending tokens below
        self._consumed: tuple[int, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Consumes an accepted token. Raises GrammarError when the grammar cannot continue."""
        self._accepted.append(token)
        if not self._matcher.consume_token(token):
            self._renew()
        self._masks = {key[1:]: mask for key, mask in self._masks.items() if key[:1] == (token,)}
        self._ahead, self._consumed = None, ()

    def allowed(self, pending: Sequence[int] = ()) -> bytes:
        """The mask of tokens that may follow the accepted ones and `pending`: token i is bit i % 8 of byte i // 8.

        After pending tokens that the grammar rejects, all tokens are allowed, because a token sampled there is never
        used. Raises GrammarError when the grammar is too complex, or no token of the vocabulary fits.
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
        """The number of leading `tokens` that the grammar allows."""
        return self._matcher.validate_tokens(tokens)

    def _renew(self) -> None:
        """Starts again with an empty lexer. Raises GrammarError if this text alone exceeds its limits."""
        self._version, self._matcher = self._grammar.matcher(after=self._version)
        self._ahead, self._consumed = None, ()
        for start in range(0, len(self._accepted), _MASKED_TOKENS):
            self._matcher.compute_bitmask()
            if not self._matcher.consume_tokens(self._accepted[start : start + _MASKED_TOKENS]):
                raise _exhausted(self._matcher)

    def _look(self, pending: tuple[int, ...]) -> bytes:
        if not pending:
            return self._mask(self._matcher)
        if self._ahead is None or pending[: len(self._consumed)] != self._consumed:
            self._ahead, self._consumed = self._matcher.deep_copy(), ()
        new = list(pending[len(self._consumed) :])
        try:
            if self._ahead.try_consume_tokens(new) == len(new):
                self._consumed = pending
                return self._mask(self._ahead)
            if self._ahead.is_error():
                raise _exhausted(self._ahead)
        except _LexerError:
            raise
        except GrammarError:
            pass  # it is raised again if the drafts are accepted
        self._ahead, self._consumed = None, ()
        return self._grammar.anything

    def _mask(self, matcher: LLMatcher) -> bytes:
        mask = self._grammar.restrict(matcher.compute_bitmask())
        if matcher.is_error() or not any(mask):
            raise _exhausted(matcher)
        return mask


class Grammar:
    """A compiled grammar. Its cursors share a lexer, which caches its states, and is replaced when it has too many."""

    def __init__(self, make: Callable[[], LLMatcher], vocab_size: int) -> None:
        self._make = make
        self._version, self._matcher = 0, make()
        self.anything = ((1 << vocab_size) - 1).to_bytes(-(-vocab_size // 8), "little")  # a mask of all tokens

    def start(self) -> Cursor:
        """A cursor at the beginning of a text."""
        return Cursor(self)

    def restrict(self, mask: bytes) -> bytes:
        """A mask without tokens outside of the model's vocabulary, which are never sampled."""
        size = len(self.anything)
        return mask[: size - 1] + bytes([mask[size - 1] & self.anything[-1]])

    def matcher(self, after: int = -1) -> tuple[int, LLMatcher]:
        """The version of a lexer, later than `after`, and a matcher of it at the beginning of a text."""
        if after == self._version:
            self._version, self._matcher = self._version + 1, self._make()
        return self._version, self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles grammar specs into grammars over one vocabulary."""

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises GrammarError for a spec that is invalid, too complex, or fits no text of this vocabulary."""
        source = _source(spec)
        grammar = Grammar(lambda: self._matcher(source, _MAX_STATES, _MAX_FUEL), self._vocab_size)
        grammar.start().allowed()
        return grammar

    def fits(self, terminal: str) -> bool:
        """Whether any text of the vocabulary fits a terminal. Raises GrammarError if it is invalid or too complex."""
        matcher = self._matcher(f"{_OPTIONS}start: TERMINAL\nTERMINAL: {terminal}", _MAX_STATES, _MAX_FUEL)
        matcher.compute_bitmask()
        if matcher.is_error() and not _has_no_text(matcher):
            raise _exhausted(matcher)
        return not matcher.is_error()

    def rehearse(self, spec: GrammarSpec) -> None:
        """Generates short random texts of a grammar. Raises GrammarError if long ones would be too complex."""
        source = _source(spec)
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
    """A cache of grammars, which are compiled in another thread. Call it from one thread."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._cached: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()

    def find(self, spec: GrammarSpec) -> Future[Grammar]:
        """The future grammar of a spec; its exception is a GrammarError."""
        found = self._cached.pop(spec, None)
        if found is None:
            found = self._thread.submit(self._compiler.compile, spec)
        self._cached[spec] = found
        if len(self._cached) > _MAX_CACHED:
            self._cached.popitem(last=False)
        return found


def _source(spec: GrammarSpec) -> str:
    """The grammar as llguidance's source text."""
    from llguidance import LLMatcher

    if spec.grammar is not None:
        return _OPTIONS + spec.grammar
    made: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(spec.regex or ""))  # does the escaping
    return _OPTIONS + str(made["grammars"][0]["lark_grammar"])


def _exhausted(matcher: LLMatcher) -> GrammarError:
    if not matcher.is_error() or _has_no_text(matcher):
        return GrammarError("no text of this model's vocabulary has the form asked for")
    kind = _LexerError if "lexer error" in _reason(matcher) else GrammarError
    return kind(f"the grammar is too complex: {_reason(matcher)}", hint="simplify it")


def _has_no_text(matcher: LLMatcher) -> bool:
    return _reason(matcher).startswith("NoExtension")


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message, without its advice and without the grammar, which was not written by the caller."""
    message = _LISTING.sub("", matcher.get_error().replace("\n<non-verbose/>", ""))
    found = _OF_REGEX.fullmatch(message)
    return " ".join((found[1] if found else message).split())[:300]
