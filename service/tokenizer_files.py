"""A tokenizer as transformers reads it: tokenizer.json and the files around it, which may name tokens that it lacks and
say which tokens are special; and the class that is named there (tokenizer_classes.py).

The order of reading is that of transformers' `_from_pretrained` and `TokenizersBackend.__init__` (AutoTokenizer is the
oracle of the tests); transformers itself, and torch with it, stays out. Knows tokens; not what a model does with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from service.tokenizer_classes import CLASSES, Marks, find_class

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MODEL_FILE = "config.json"
MAP_FILE, ADDED_FILE = "special_tokens_map.json", "added_tokens.json"  # of older libraries
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_EVEN_FOR_BPE = "_for_bpe_even_though_it_will_corrupt_output"

ReadJson = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files around one tokenizer.json."""

    folder: Path
    config: Mapping[str, Any]  # tokenizer_config.json
    kind: str | None  # transformers' class; None: tokenizer.json as it is
    named: dict[str, AddedToken]  # special tokens by name, as eos_token; those of transformers first
    extra: list[AddedToken]  # special tokens without a name
    listed: dict[int, AddedToken]  # by the id that is stated, which is but their order
    older: bool  # whether `listed` is of added_tokens.json, and tokenizer.json says the same better

    @classmethod
    def read(cls, folder: Path, read_json: ReadJson | None = None) -> TokenizerFiles:
        """Raises what `read_json` does, TypeError and ValueError for fields of another kind."""
        read = read_json or _read_json

        def read_any(name: str) -> dict[str, Any]:
            return read(folder / name) if (folder / name).exists() else {}

        def is_byte_level() -> bool:
            parts = read_any(TOKENIZER_FILE)
            return '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])

        config = read_any(CONFIG_FILE)
        kind = find_class(read_any(MODEL_FILE), config, is_byte_level)
        older = "added_tokens_decoder" not in config
        fields = {name: value for name, value in config.items() if name != _OLD_EXTRA}
        fields[_EXTRA] = config.get(_EXTRA) or config.get(_OLD_EXTRA)
        if older:
            _merge(fields, read_any(MAP_FILE))
        named = _named({**(CLASSES[kind].tokens if kind in CLASSES else {}), **fields})
        extra = [] if isinstance(fields[_EXTRA], dict) else [_token(value) for value in fields[_EXTRA] or ()]
        if older:
            special = {token.content for name, token in named.items() if name in NAMES} | {one.content for one in extra}
            listed = {
                int(id): AddedToken(text, normalized=text not in special, special=text in special)
                for text, id in read_any(ADDED_FILE).items()
            }
        else:
            listed = {int(id): _token(token, special=False) for id, token in config["added_tokens_decoder"].items()}
        return cls(folder, config, kind, named, extra, listed, older)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named ones, as a chat template may use them."""
        return {name: token.content for name, token in self.named.items()}

    def unlike_transformers(self, tokenizer: Tokenizer) -> Iterator[str]:
        """The fields of tokenizer_config.json that transformers would act on and that have no effect here."""
        if self.kind is not None and self.kind not in CLASSES:
            yield f"tokenizer_class: {self.kind!r:.80} is not known here: {TOKENIZER_FILE} is taken as it is"
        versions = self.config.get("fast_tokenizer_files")
        if versions and versions != [TOKENIZER_FILE]:
            yield f"fast_tokenizer_files: {versions!r:.80}: {TOKENIZER_FILE} is read, whichever version they are for"
        field = "clean_up_tokenization_spaces"
        if self.config.get(field) and (self.config.get(f"{field}{_EVEN_FOR_BPE}") or not _is_bpe(tokenizer)):
            yield f"{field}: {self.config[field]!r:.80} is not applied: texts are streamed as their tokens decode"

    def open(self) -> Tokenizer:
        """The tokenizer with all its tokens. Raises what the tokenizers library does."""
        tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER_FILE))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        own = CLASSES.get(self.kind or "")
        if own is not None and _is_bpe(tokenizer):
            own.build(tokenizer, {**self.config, **self.special_tokens})
        tokenizer.add_tokens(self._missing(tokenizer.get_added_tokens_decoder()))
        if own is not None and own.marks is not None:
            stated = {**self.listed, **tokenizer.get_added_tokens_decoder()} if self.older else self.listed
            tokenizer.add_special_tokens(self._marked(own.marks, {token.content: token for token in stated.values()}))
        tokenizer.encode_special_tokens = bool(self.config.get("split_special_tokens"))
        return tokenizer

    def _marked(self, marks: Marks, stated: Mapping[str, AddedToken]) -> list[AddedToken]:
        """All special tokens, for a class that adds them once more."""
        if marks == "plain":
            names = dict.fromkeys(token.content for token in (*self.named.values(), *self.extra))
            return [AddedToken(text, special=True) for text in names]
        own = [stated.get(token.content, token) for name, token in self.named.items() if name in NAMES]
        return [*own, *self.extra]

    def _missing(self, present: Mapping[int, AddedToken]) -> list[AddedToken]:
        """Tokens that tokenizer.json has not, or has with other properties."""
        listed = {**self.listed, **present} if self.older else self.listed
        same = {repr(token) for token in present.values()}
        tokens = [token for _, token in sorted(listed.items(), key=lambda item: item[0]) if repr(token) not in same]
        known = {token.content for token in (*present.values(), *tokens)}
        names = {token.content for token in self.named.values()}
        for token in (*self.named.values(), *self.extra):
            if token.content not in known:
                tokens.append(token)
                known.add(token.content)
        for token in tokens:
            token.special = token.special or token.content in names
        return tokens


def _is_bpe(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.model, models.BPE)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with the tokens that are named beside it."""
    return TokenizerFiles.read(path.parent).open()


def _merge(fields: dict[str, Any], older: Mapping[str, Any]) -> None:
    """Puts special_tokens_map.json over tokenizer_config.json, except what has no name: that is added, or left out
    where the newer file has such tokens.
    """
    for name, value in older.items():
        if name == _OLD_EXTRA:
            fields[_EXTRA] = fields[_EXTRA] or value
        elif name == _EXTRA and isinstance(value, list):
            fields[_EXTRA] = [*(fields[_EXTRA] or ()), *value]
        else:
            fields[name] = {**value, "special": True} if isinstance(value, dict) and name != _EXTRA else value


def _named(fields: Mapping[str, Any]) -> dict[str, AddedToken]:
    more = fields[_EXTRA] if isinstance(fields[_EXTRA], dict) else {}
    names = [*NAMES, *(name for name in fields if name.endswith("_token") and name not in NAMES), *more]
    values = {name: more.get(name, fields.get(name)) for name in names}
    return {name: _token(value) for name, value in values.items() if isinstance(value, str | dict)}


def _token(value: Any, special: bool = True) -> AddedToken:
    """A token is a text or an object; one that transformers has tagged says itself whether it is special."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TypeError(f"expected a token, found {value!r:.80}")
    options = {name: option for name, option in value.items() if name not in ("__type", "content")}
    return AddedToken(value["content"], **{"special": special and "__type" not in value, **options})


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
