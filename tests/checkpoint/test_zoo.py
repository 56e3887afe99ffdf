"""Tokenizers and their templates as transformers' AutoTokenizer reads them, for a zoo of folders."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from tokenizers import AddedToken
from transformers import AutoTokenizer, TokenizersBackend
from transformers.models.auto import tokenization_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from service.api.generation.detokenizer import Detokenizer
from service.api.generation.vocabulary import Vocabulary
from service.chat_template import Chat, ChatTemplate
from service.checkpoint import load_checkpoint
from service.contract.errors import InvalidRequestError
from service.tokenizer_classes import CLASSES, MISNAMED, REGISTERED
from service.tokenizer_files import NAMES, TokenizerFiles
from tests.support.bundles import make_bundle
from tests.support.damage import set_json
from tests.support.zoo import CHATML, TEXTS, ZOO, Folder, byte_level, wordpiece

TEMPLATES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "named": "{{ image_token }}{{ fim_token is defined }}{{ pad_token }}"
    "{% for m in messages %}<q>{{ m.content | trim }}</s>{% endfor %}",
}
NEWER = hasattr(TokenizersBackend, "_tokenizer_json_has_byte_level")
KINDS = [kind for kind in ZOO if NEWER or kind != "Llama's class over bytes"]  # which older versions damage
CLEAN_UP = "clean_up_tokenization_spaces"
EVEN_FOR_BPE = f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output"
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


@pytest.mark.skipif(not NEWER, reason="registers less")
def test_classes_are_those_of_transformers() -> None:
    """What is registered for decoders, whose files are misnamed, and the special tokens of each class."""
    for kind in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *REGISTERED}:
        theirs = tokenization_auto.TOKENIZER_MAPPING_NAMES.get(kind)
        if theirs in {*CLASSES, "TokenizersBackend"} or kind in REGISTERED:
            assert REGISTERED.get(kind) == theirs, kind
    misnamed = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert set(MISNAMED) == {kind for kind in misnamed if REGISTERED.get(kind, "TokenizersBackend") in CLASSES}
    for name, known in CLASSES.items():
        theirs = inspect.signature(tokenization_auto.tokenizer_class_from_name(name)).parameters
        assert known.tokens == {key: theirs[key].default for key in NAMES if key in theirs and theirs[key].default}


@pytest.mark.parametrize("name", ["XGLMTokenizer", "CodeLlamaTokenizerFast"])
def test_what_is_not_followed_is_a_warning(tmp_path: Path, name: str) -> None:
    """tokenizer.json is taken as it is, where transformers may build another one or read another file."""
    bundle = make_bundle(tmp_path / "tiny", experts=["a"])
    set_json("base/tokenizer_config.json", tokenizer_class=name)(bundle)
    expected = f"tokenizer_class: '{name.removesuffix('Fast')}' is not known here: tokenizer.json is taken as it is"
    assert [line for line in load_checkpoint(bundle).warnings if expected in line]
    set_json("base/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(bundle)
    assert load_checkpoint(bundle).warnings == ()
    set_json("base/tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json", "tokenizer.json"])(bundle)
    assert "fast_tokenizer_files: ['tokenizer.4.0.0.json'" in load_checkpoint(bundle).warnings[0]


@pytest.mark.parametrize(
    ("tokenizer", "settings", "warns"),
    [
        (wordpiece, {"clean_up_tokenization_spaces": True}, True),
        (wordpiece, {"clean_up_tokenization_spaces": False}, False),
        (byte_level, {"clean_up_tokenization_spaces": True}, False),
        (byte_level, {"clean_up_tokenization_spaces": True, EVEN_FOR_BPE: True}, True),
    ],
)
def test_spaces_that_transformers_would_clean_up(tmp_path: Path, tokenizer: Any, settings: Any, warns: bool) -> None:
    """A warning where its text differs from that of the tokens, none where it is the same."""
    files = TokenizerFiles.read(Folder(tokenizer, {"tokenizer_config.json": settings}).write(tmp_path))
    ours = files.open()
    ids = ours.encode("what ? no ! yes , so .").ids
    assert (ours.decode(ids) != theirs_of(tmp_path).decode(ids, skip_special_tokens=True)) == warns
    assert [problem.partition(":")[0] for problem in files.unlike_transformers(ours)] == [CLEAN_UP] * warns


def represented(tokens: dict[int, AddedToken]) -> dict[int, str]:
    """With all properties, which comparing tokens leaves out."""
    return {id: repr(token) for id, token in tokens.items()}


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_make_the_text_of_transformers(tmp_path: Path, kind: str) -> None:
    ours = TokenizerFiles.read(ZOO[kind].write(tmp_path)).open()
    theirs, vocabulary = theirs_of(tmp_path), Vocabulary(ours)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        detokenizer = Detokenizer(ours, vocabulary)
        written = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
        assert written == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
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
