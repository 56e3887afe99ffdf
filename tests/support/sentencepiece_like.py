"""A small tokenizer of SentencePiece's kind, as Llama 2 and Mistral have it: ▁ for a space, bytes for what it lacks."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

_SPECIAL = ["<unk>", "<s>", "</s>"]
_PIECES = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁▁", "é"]
_MERGES = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab"), ("▁", "▁")]


def build_sentencepiece(*, metaspace: bool = False) -> Tokenizer:
    """Its decoder drops the space that its normalizer puts before a text: by a step of its own, or by Metaspace."""
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), *steps])
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.add_tokens(["  x"])
    return tokenizer
