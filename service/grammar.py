"""What a text must be, as a mask over the vocabulary for every next token. No torch, no HTTP.

llguidance does the work; it is imported where the first grammar is compiled, because few processes need one. A grammar
is compiled once and shared, and each choice moves a `Cursor` of its own through it. What comes next after tokens that
are not accepted yet (drafts) is looked up on a copy: a wrong draft leaves nothing behind.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from service.contract.errors import InvalidRequestError
from service.contract.request import TextForm
from service.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Between the parts of JSON. A model that was not trained on JSON would go on with spaces and line breaks for ever.
_JSON: JsonCompileOptions = {"whitespace_pattern": " ?"}
_CACHED = 64  # grammars kept, the last used ones
# Of the lexer and the parser, at each step: a mask takes some 10 ms at worst.
_MAX_STATES = 20_000
_MAX_FUEL = 200_000
_MAX_ITEMS = 20_000
_MAX_SYMBOLS = 100_000


def refusal(message: str, hint: str | None = None) -> InvalidRequestError:
    """The form of text is at fault."""
    return InvalidRequestError(message, param="response_format", code="invalid_response_format", hint=hint)


class Cursor:
    """How far one text has come in its grammar."""

    def __init__(self, matcher: LLMatcher, mask_bytes: int) -> None:
        self._matcher = matcher
        self._mask_bytes = mask_bytes
        self._masks: dict[tuple[int, ...], bytes] = {}  # after these pending tokens
        self._ahead: LLMatcher | None = None  # a copy that has taken in the pending tokens below
        self._taken: tuple[int, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Moves on. Raises InvalidRequestError where the grammar cannot go on."""
        if not self._matcher.consume_token(token):
            raise _exhausted(self._matcher)
        self._masks = {key[1:]: mask for key, mask in self._masks.items() if key[:1] == (token,)}
        self._ahead, self._taken = None, ()

    def allowed(self, pending: Sequence[int] = ()) -> bytes:
        """The tokens that may follow the accepted ones and `pending`, which may be wrong: bit i % 8 of byte i // 8.

        After wrong ones anything may: what is sampled there is never used. Raises InvalidRequestError where the
        grammar is too complex, or no token of the vocabulary fits.
        """
        key = tuple(pending)
        if key not in self._masks:
            self._masks[key] = self._look_ahead(key) if key else self._mask(self._matcher)
        return self._masks[key]

    def fitting(self, tokens: list[int]) -> int:
        """How many of `tokens` the grammar allows, from the first on."""
        return self._matcher.validate_tokens(tokens)

    def _look_ahead(self, pending: tuple[int, ...]) -> bytes:
        if self._ahead is None or pending[: len(self._taken)] != self._taken:
            self._ahead, self._taken = self._matcher.deep_copy(), ()
        new = list(pending[len(self._taken) :])
        try:
            if self._ahead.try_consume_tokens(new) == len(new):
                self._taken = pending
                return self._mask(self._ahead)
        except InvalidRequestError:
            pass  # it will be raised again if the text comes here
        self._ahead, self._taken = None, ()
        return b"\xff" * self._mask_bytes

    def _mask(self, matcher: LLMatcher) -> bytes:
        mask = matcher.compute_bitmask()[: self._mask_bytes]
        if matcher.is_error() or not any(mask):
            raise _exhausted(matcher)
        return mask


class Grammar:
    """A compiled form of text."""

    def __init__(self, matcher: LLMatcher, mask_bytes: int) -> None:
        self._matcher = matcher
        self._mask_bytes = mask_bytes

    def start(self) -> Cursor:
        """A cursor at the beginning."""
        return Cursor(self._matcher.deep_copy(), self._mask_bytes)


class GrammarCompiler:
    """Forms of text to grammars over one vocabulary."""

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None

    def compile(self, form: TextForm) -> Grammar:
        """Raises InvalidRequestError for what is no grammar, is too complex, or fits no text of this vocabulary."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            step_lexer_fuel=_MAX_FUEL,
            step_max_items=_MAX_ITEMS,
            max_lexer_states=_MAX_STATES,
            max_grammar_size=_MAX_SYMBOLS,
            verbose_errors=False,
        )
        try:
            source = (
                LLMatcher.grammar_from_regex(form.regex or "")
                if form.json_schema is None
                else LLMatcher.grammar_from_json_schema(form.json_schema, overrides=_JSON)
            )
        except ValueError as error:  # what its reader of JSON does not take
            raise refusal(_one_line(str(error))) from None
        matcher = LLMatcher(self._load_tokenizer(), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise refusal(_reason(matcher))
        grammar = Grammar(matcher, -(-self._vocab_size // 8))
        grammar.start().allowed()
        return grammar

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            text = _sampled_tokens(open_tokenizer(Path(self._tokenizer_path)), self._vocab_size)
            try:
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None)
            except ValueError as error:
                raise refusal(f"this model's tokenizer cannot be held to a form of text: {error}") from None
        return self._tokenizer


class Grammars:
    """The grammars in use; new ones are compiled beside the caller, in a thread. Call it from one thread."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._found: OrderedDict[TextForm, Future[Grammar]] = OrderedDict()

    def find(self, form: TextForm) -> Future[Grammar]:
        """The grammar of a form, now or soon; its error is InvalidRequestError."""
        found = self._found.pop(form, None)
        if found is None:
            found = self._thread.submit(self._compiler.compile, form)
        self._found[form] = found
        if len(self._found) > _CACHED:
            self._found.popitem(last=False)
        return found


def _sampled_tokens(tokenizer: Tokenizer, vocab_size: int) -> str:
    """tokenizer.json without the tokens beyond the model's vocabulary: they are never sampled. Were they only masked
    out, llguidance would still write a text that a grammar leaves no choice about with them, and allow nothing else.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocab_size:
        return tokenizer.to_str()
    content: dict[str, Any] = json.loads(tokenizer.to_str())  # with the ids that the tokens really have
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    model: dict[str, Any] = content["model"]
    if isinstance(model["vocab"], list):  # Unigram: a token's place is its id
        model["vocab"] = model["vocab"][:vocab_size]
    else:
        model["vocab"] = {token: id for token, id in model["vocab"].items() if id < vocab_size}
    if "merges" in model:
        prefix: str = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if {left, right, left + right.removeprefix(prefix)} <= model["vocab"].keys()
        ]
    return json.dumps(content)


def _exhausted(matcher: LLMatcher) -> InvalidRequestError:
    reason = _reason(matcher) if matcher.is_error() else "NoExtension"
    if not reason.startswith("NoExtension"):
        return refusal(f"the form of text is too complex: {reason}", hint="simplify it")
    return refusal("no text of this model's vocabulary has the form asked for")


def _reason(matcher: LLMatcher) -> str:
    """The first line of what llguidance says, without its own advice."""
    message = matcher.get_error().replace("\n<non-verbose/>", "").strip()
    if message.startswith("oneOf constraints"):
        return "oneOf is supported only where it is plain that at most one alternative fits; use anyOf"
    return _one_line(message)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
