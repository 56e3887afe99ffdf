"""Tokenizers and their templates as transformers' AutoTokenizer reads them, for a zoo of folders."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils import logging

from service.api.generation.detokenizer import Detokenizer
from service.api.generation.vocabulary import Vocabulary
from service.chat_template import Chat, ChatTemplate
from service.contract.errors import InvalidRequestError
from service.tokenizer_files import TokenizerFiles
from tests.support.zoo import CHATML, TEXTS, ZOO

TEMPLATES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "named": "{{ image_token }}{{ fim_token is defined }}{{ pad_token }}"
    "{% for m in messages %}<q>{{ m.content | trim }}</s>{% endfor %}",
}
TURNS = [
    {"role": "user", "content": " the <q> end "},
    {"role": "assistant", "content": "and</s> then"},
    {"role": "user", "content": "🙂 <tool>"},
]


def theirs_of(folder: Path) -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)


def represented(tokens: dict[int, AddedToken]) -> dict[int, str]:
    """With all properties, which comparing tokens leaves out."""
    return {id: repr(token) for id, token in tokens.items()}


@pytest.mark.parametrize("kind", ZOO)
def test_tokens_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """Special tokens, every added token with its properties, ids of texts with and without special tokens, and back."""
    files = TokenizerFiles.read(ZOO[kind].write(tmp_path))
    ours, theirs = files.open(), theirs_of(tmp_path)
    assert files.special_tokens == theirs.special_tokens_map
    eos = files.special_tokens.get("eos_token")
    assert (None if eos is None else ours.token_to_id(eos)) == theirs.eos_token_id
    assert represented(ours.get_added_tokens_decoder()) == represented(theirs.added_tokens_decoder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special).ids
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text


@pytest.mark.parametrize("kind", ZOO)
def test_tokens_one_by_one_make_the_text_of_transformers(tmp_path: Path, kind: str) -> None:
    ours = TokenizerFiles.read(ZOO[kind].write(tmp_path)).open()
    theirs, vocabulary = theirs_of(tmp_path), Vocabulary(ours)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        detokenizer = Detokenizer(ours, vocabulary)
        written = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
        assert written == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ZOO)
def test_chats_are_those_of_transformers(tmp_path: Path, kind: str, template: str) -> None:
    ours = ChatTemplate.load(ZOO[kind].write(tmp_path, TEMPLATES[template]))
    assert ours is not None
    tokenizer, theirs = TokenizerFiles.read(tmp_path).open(), theirs_of(tmp_path)
    try:
        expected = theirs.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    except UndefinedError as error:  # a name that is not there, added to a text
        with pytest.raises(InvalidRequestError, match=re.escape(str(error))):
            ours.render(Chat(TURNS))
        return
    assert tokenizer.encode(ours.render(Chat(TURNS)), add_special_tokens=False).ids == expected
