"""Tokenizer folders as current, older and other libraries leave them behind: a tokenizer.json, and beside it any of the
files that name more tokens. Nothing is trained: vocabularies are written out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PAIRS = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it"]
OLD = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}  # an AddedToken, before "special"
STRIPPING = {**OLD, "lstrip": True, "rstrip": True}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *PAIRS, *(f"Ġ{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), "</s>"]
    merges = [*((pair[0], pair[1]) for pair in PAIRS), *(("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral have it: bytes for what is not in the vocabulary, a space before every text, <s> first."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-\u2581"
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"\u2581{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, *letters, *PAIRS, *words]
    merges = [*((pair[0], pair[1]) for pair in PAIRS), *((word[0], word[1]) for word in words)]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT has it: no case, words in pieces, marks of punctuation by themselves."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{one}" for one in letters),
        *".,!?'-:;()",
        "the",
        "##ing",
    ]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XGLM have it."""
    pieces = ["</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz .,!?'", *PAIRS, "\u2581the", "\u2581a"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - len(pieces) / 9 / len(piece)) for piece in pieces], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@dataclass(frozen=True)
class Folder:
    """One kind of folder: how its tokenizer.json is made, and the JSON of the files beside it."""

    tokenizer: Callable[[], Tokenizer] = byte_level
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, template: str | None = None) -> Path:
        """Into `path`, with a config.json of a family that has no tokenizer of its own."""
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer().save(str(path / "tokenizer.json"))
        files = {"config.json": {"model_type": "llama"}, **self.files}
        if template is not None:
            files["tokenizer_config.json"] = {**files.get("tokenizer_config.json", {}), "chat_template": template}
        for name, content in files.items():
            (path / name).write_text(json.dumps(content), "utf-8")
        return path


def _with(make: Callable[[], Tokenizer], *tokens: AddedToken) -> Callable[[], Tokenizer]:
    def made() -> Tokenizer:
        tokenizer = make()
        tokenizer.add_tokens(list(tokens))
        return tokenizer

    return made


def _config(**fields: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": fields}


TAGGED = {"__type": "AddedToken", **OLD}
ZOO: dict[str, Folder] = {
    "tokenizer.json alone": Folder(),
    "SentencePiece alone": Folder(sentencepiece),
    "WordPiece alone": Folder(wordpiece),
    "Unigram alone": Folder(unigram),
    "names of tokens that are there": Folder(
        sentencepiece, _config(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ),
    "a class that is but a name": Folder(
        sentencepiece, _config(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    ),
    "names of tokens that are not": Folder(byte_level, _config(eos_token="</s>", pad_token="<pad>", fim_token="<fim>")),
    "tagged objects": Folder(
        byte_level,
        _config(eos_token={**TAGGED, "content": "</s>"}, pad_token={**TAGGED, **STRIPPING, "content": "<pad>"}),
    ),
    "added_tokens_decoder": Folder(
        byte_level,
        _config(
            eos_token="<|im_end|>",
            added_tokens_decoder={
                "400": {"content": "<tool>", **OLD, "special": False},
                "302": {"content": "<|im_start|>", **OLD, "special": True},
                "303": {"content": "<|im_end|>", **OLD, "special": True},
            },
        ),
    ),
    "added_tokens_decoder with other properties": Folder(
        _with(byte_level, AddedToken("<a>", normalized=False), AddedToken("<b>", special=True)),
        _config(
            eos_token="<b>",
            added_tokens_decoder={
                "301": {"content": "<a>", **STRIPPING, "special": True},
                "302": {"content": "<b>", **OLD, "special": False},
            },
        ),
    ),
    "added_tokens_decoder over older files": Folder(
        byte_level,
        {
            **_config(added_tokens_decoder={"301": {"content": "<new>", **OLD, "special": False}}, eos_token="</s>"),
            "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": "<old>"},
            "added_tokens.json": {"<older>": 301},
        },
    ),
    "additional_special_tokens": Folder(
        sentencepiece, _config(additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    ),
    "additional_special_tokens, tagged": Folder(
        byte_level, _config(additional_special_tokens=[{**TAGGED, "content": "<q>"}])
    ),
    "extra_special_tokens": Folder(
        byte_level, _config(extra_special_tokens=["<q>", "</s>"], additional_special_tokens=["<p>"])
    ),
    "extra_special_tokens by name": Folder(
        byte_level, _config(extra_special_tokens={"image_token": "<img>"}, eos_token="</s>")
    ),
    "special_tokens_map.json": Folder(
        sentencepiece,
        {
            "special_tokens_map.json": {
                "eos_token": {"content": "</s>", **OLD},
                "pad_token": "<pad>",
                "additional_special_tokens": ["<q>"],
            }
        },
    ),
    "special_tokens_map.json over tokenizer_config.json": Folder(
        byte_level,
        {
            **_config(eos_token="<e>", additional_special_tokens=["<z>"]),
            "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<q>"]},
        },
    ),
    "special_tokens_map.json with more": Folder(
        byte_level,
        {
            **_config(extra_special_tokens=["<z>"]),
            "special_tokens_map.json": {
                "extra_special_tokens": ["<q>", {"content": "<w>", **OLD}],
                "fim_token": {"content": "<fim>", **STRIPPING},
            },
        },
    ),
    "added_tokens.json": Folder(wordpiece, {**_config(eos_token="<m>"), "added_tokens.json": {"<n>": 90, "<m>": 89}}),
    "added_tokens.json of the same ids": Folder(
        _with(byte_level, AddedToken("<h>", special=True, normalized=False)),
        {"added_tokens.json": {"<m>": 301, "<n>": 302}},
    ),
    "special tokens are split": Folder(byte_level, _config(eos_token="</s>", split_special_tokens=True)),
    "spaces of BPE are not": Folder(sentencepiece, _config(clean_up_tokenization_spaces=True, eos_token="</s>")),
    "bos by the settings": Folder(
        byte_level, _config(bos_token="<s>", eos_token="</s>", add_bos_token=True, add_eos_token=True)
    ),
    "Llama's class": Folder(sentencepiece, _config(tokenizer_class="LlamaTokenizerFast", pad_token="<pad>")),
    "Llama's class, as before": Folder(
        sentencepiece, _config(tokenizer_class="LlamaTokenizer", legacy=True, add_prefix_space=None, unk_token=None)
    ),
    "Llama's class without a first space": Folder(
        sentencepiece, _config(tokenizer_class="LlamaTokenizer", add_prefix_space=False, eos_token="</s>")
    ),
    "Llama's class over bytes": Folder(byte_level, _config(tokenizer_class="LlamaTokenizer", eos_token="</s>")),
    "Llama's class, misnamed": Folder(
        byte_level, {"config.json": {"model_type": "qwen2"}, **_config(tokenizer_class="LlamaTokenizerFast")}
    ),
    "GPT-2's by type": Folder(byte_level, {"config.json": {"model_type": "gpt2"}}),
    "GPT-2's with a first space": Folder(
        byte_level, {"config.json": {"model_type": "opt"}, **_config(add_prefix_space=True, bos_token="</s>")}
    ),
    "GPT-NeoX's": Folder(
        byte_level, _config(tokenizer_class="GPTNeoXTokenizerFast", add_bos_token=True, bos_token="</s>")
    ),
    "Qwen's": Folder(
        byte_level,
        _config(
            tokenizer_class="Qwen2Tokenizer",
            eos_token="<|im_end|>",
            additional_special_tokens=["<|im_start|>"],
            added_tokens_decoder={
                "302": {"content": "<|im_start|>", **OLD, "special": True},
                "303": {"content": "<|im_end|>", **STRIPPING, "special": True},
            },
        ),
    ),
    "Qwen 3.5's": Folder(byte_level, {"config.json": {"model_type": "qwen3_5_text"}}),
    "Gemma's by type": Folder(sentencepiece, {"config.json": {"model_type": "gemma3"}}),
    "Gemma's of images": Folder(
        sentencepiece,
        {
            "config.json": {"model_type": "gemma3"},
            **_config(tokenizer_class="GemmaTokenizer", extra_special_tokens={"image_token": "<img>"}),
        },
    ),
    "Cohere's": Folder(
        byte_level,
        _config(tokenizer_class="CohereTokenizerFast", eos_token={**TAGGED, **STRIPPING, "content": "</s>"}),
    ),
    "a class that the type has not": Folder(
        sentencepiece, {"config.json": {"model_type": "mistral"}, **_config(tokenizer_class="LlamaTokenizer")}
    ),
    "a class of nobody's": Folder(sentencepiece, _config(tokenizer_class="OurTokenizer", eos_token="</s>")),
    "nothing": Folder(byte_level, _config(eos_token=None, extra_special_tokens=[], added_tokens_decoder={})),
}
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "a ",
    "the end of the thing",
    "Hello, world!",
    "the  theme  other\n\nthen",
    "tabs\tand\r\n",
    "naïve café",
    "日本語のテキスト",
    "🙂",
    "🙂🙃",
    "👩‍👩‍👧",
    "e\u0301",
    "\u200b",
    "ﬁne",
    "ÀÉÎ",
    "1234567890",
    "3.14 and -2",
    "don't can't I'm",
    "she's we've they're",
    "what ? no ! yes , so .",
    "a ' b",
    "</s>",
    "a</s>b",
    " </s> ",
    "<s>",
    "<|im_start|>user\nhi<|im_end|>",
    "<tool>",
    "x<tool>y",
    "<q>",
    "a <q> b",
    "<z><q><w>",
    "<pad>",
    " <pad> a",
    "<fim>",
    "<img>",
    "<m><n>",
    "<h> <n>",
    "<new>",
    "<older>",
    "<a> <b>",
    "[CLS] the [SEP]",
    "[PAD]",
    "<unk>",
    "<0x41>",
    "\u2581the",
    "Ġa",
    "UPPER lower",
    "a" * 70,
    "the quick brown fox jumps over the lazy dog",
]
