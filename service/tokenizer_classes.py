"""The class that transformers makes of a tokenizer's folder. Some classes take no more than vocabulary, merges and
post-processor from tokenizer.json: how a text is normalised, split and decoded is theirs, and so are special tokens
that no file names.

Follows transformers 5: AutoTokenizer.from_pretrained chooses, and each class's __init__ builds (AutoTokenizer is the
oracle of the tests). Knows the classes of decoders; what another class would do is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

GENERIC = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")  # tokenizer.json as it is
_BACKEND = "TokenizersBackend"
# The classes that transformers has registered for types of decoders; types that are not here have none.
_REGISTERED: dict[str, tuple[str, ...]] = {
    _BACKEND: (
        *("beam", "bigbird_pegasus", "ernie4_5", "ernie4_5_moe", "flex_olmo", "fuyu", "glm", "glm4", "glm4_moe"),
        *("glm4_moe_lite", "got_ocr2", "gpt_bigcode", "granite", "granitemoe", "granitemoehybrid"),
        *("granitemoeshared", "hyperclovax", "internlm3", "iquestcoder", "jamba", "kimi_linear", "llava"),
        *("mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mistral3", "mixtral"),
        *("modernbert-decoder", "nemotron", "olmo2", "olmo3", "olmo_hybrid", "persimmon", "phi3", "phimoe"),
        *("stablelm", "xlm-roberta-xl"),
    ),
    "CohereTokenizer": ("cohere", "cohere2"),
    "GemmaTokenizer": (
        *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma", "zaya"),
    ),
    "GPT2Tokenizer": (*("codegen", "dbrx", "emu3", "gpt2", "gpt_neo", "gptj", "jais2", "opt", "phi", "starcoder2"),),
    "GPTNeoXTokenizer": (*("falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv", "xlstm"),),
    "Qwen2Tokenizer": (
        *("dots3_note", "moss_transcribe_diarize", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"),
    ),
    "Qwen3_5Tokenizer": ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen4_exp"),
    "XGLMTokenizer": ("xglm",),
}
REGISTERED = {kind: name for name, kinds in _REGISTERED.items() for kind in kinds}
# Types whose files name a wrong class: the registered one is taken.
MISNAMED = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp")

_WORD_OF_QWEN2 = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD_OF_QWEN3_5 = r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"


Marks = Literal["plain", "as stated"]  # without other properties than special; with those of the files


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """The parts that a class has of its own."""

    tokens: Mapping[str, str]  # special tokens where no file names them
    build: Callable[[Tokenizer, Mapping[str, Any]], None]  # from tokenizer_config.json's fields
    marks: Marks | None = None  # how it adds all special tokens once more, where it does


def find_class(config: Mapping[str, Any], settings: Mapping[str, Any], is_byte_level: Callable[[], bool]) -> str | None:
    """The class's name; None where tokenizer.json is taken as it is. `config` is the model's, `settings` the
    tokenizer's.
    """
    kind, stated = config.get("model_type"), settings.get("tokenizer_class") or config.get("tokenizer_class")
    registered = REGISTERED.get(kind) if isinstance(kind, str) else None
    name = stated.removesuffix("Fast") if isinstance(stated, str) else None
    if name == "LlamaTokenizer" and kind not in MISNAMED and is_byte_level():
        return None  # as Llama 3 has it, and Llama's class is for SentencePiece
    if name is None or (registered is not None and (registered == _BACKEND or kind in MISNAMED)):
        name = registered
    return None if name in (None, *GENERIC) else name


def _build_llama(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    prefix = settings.get("add_prefix_space")
    has_prefix = prefix is None or bool(prefix)
    scheme = "never" if not has_prefix else "always" if settings.get("legacy", False) else "first"
    _set_model(tokenizer, fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if has_prefix else [])])


def _build_gemma(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    _set_model(tokenizer, fuse_unk=True, byte_fallback=True, unk_token=settings.get("unk_token", "<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _build_gpt2(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    _set_byte_level(tokenizer, None, _byte_level(settings))


def _build_gpt_neox(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    _set_byte_level(tokenizer, normalizers.NFC(), _byte_level(settings))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def _build_cohere(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    _set_byte_level(tokenizer, normalizers.NFC(), pre_tokenizers.Sequence([digits, _byte_level(settings)]))


def _build_qwen2(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    _set_byte_level(tokenizer, normalizers.NFC(), _qwen(_WORD_OF_QWEN2, settings))


def _build_qwen3_5(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    _set_byte_level(tokenizer, normalizers.NFC(), _qwen(_WORD_OF_QWEN3_5, settings))


def _qwen(word: str, settings: Mapping[str, Any]) -> pre_tokenizers.PreTokenizer:
    pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{word}|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, _byte_level(settings, use_regex=False)])


def _byte_level(settings: Mapping[str, Any], use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=use_regex)


def _set_byte_level(
    tokenizer: Tokenizer, normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> None:
    _set_model(tokenizer, fuse_unk=False, byte_fallback=False)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()


def _set_model(tokenizer: Tokenizer, *, fuse_unk: bool, byte_fallback: bool, unk_token: Any = None) -> None:
    """BPE's options; what a class does not name is off."""
    model: models.BPE = tokenizer.model
    model.fuse_unk, model.byte_fallback, model.unk_token = fuse_unk, byte_fallback, unk_token
    model.ignore_merges, model.dropout = False, None


_END = "<|endoftext|>"
_TOKENS_OF_QWEN = {"unk_token": _END, "eos_token": _END, "pad_token": _END}
CLASSES: dict[str, TokenizerClass] = {
    "LlamaTokenizer": TokenizerClass({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, _build_llama),
    "GemmaTokenizer": TokenizerClass(
        {
            **{"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"},
            **{"pad_token": "<pad>", "mask_token": "<mask>"},
        },
        _build_gemma,
    ),
    "GPT2Tokenizer": TokenizerClass({"unk_token": _END, "bos_token": _END, "eos_token": _END}, _build_gpt2),
    "GPTNeoXTokenizer": TokenizerClass(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"}, _build_gpt_neox
    ),
    "CohereTokenizer": TokenizerClass(
        {
            **{"unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
            **{"pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"},
        },
        _build_cohere,
        marks="as stated",
    ),
    "Qwen2Tokenizer": TokenizerClass(_TOKENS_OF_QWEN, _build_qwen2, marks="plain"),
    "Qwen3_5Tokenizer": TokenizerClass(_TOKENS_OF_QWEN, _build_qwen3_5),
}
