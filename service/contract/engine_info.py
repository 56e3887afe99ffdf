"""Facts about the loaded engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about the loaded engine; the API's /info and its limits come from here."""

    model: str  # the bundle's name
    architecture: str  # "LlamaForCausalLM"
    dtype: str  # "float32"
    device: str  # "cpu", "cuda:0 (NVIDIA H200)"
    experts: list[dict[str, str]]  # [{"name", "description"}] in class order
    sites: list[str]
    xlora_config: dict[str, object]
    dummy_row: list[list[float]]  # [S, E] gate of the scaling pass
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int  # tokens, prompt + output
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_blocks_total: int
    kv_bytes: int
    weights_sha256: str | None  # over the hashes of all weight files; None: not known yet
    fingerprint: str  # of the weight files' headers and sizes
    versions: dict[str, str]
    tokenizer_path: str  # tokenizer.json of the base
    gate_profile: dict[str, object] | None = None
    draft_head: int | None = None  # its width
    draft_layer: list[float] = field(default_factory=list)  # its agreement at depth 1, 2, ...; empty: there is none
