"""Every decoder family: greedy tokens and scalings through the engine are PEFT's, with everything on that may go wrong.

No family has a file of ours; what differs between them (soft caps, windows, embedding scales, fused or transposed
weights, multipliers) is in transformers' modules, and this is where we would notice that one is not honoured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.model.two_pass import TwoPassModel
from tests.bundles import make_bundle
from tests.engine.driver import Engines, greedy, run, words
from tests.model.tiny import CPU, Tiny, assert_same
from tests.two_pass import TwoPassOracle

STEPS = 48
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"targets": ALL},
    "mistral": {"targets": ALL, "base_config": {"sliding_window": 8}},
    "qwen2": {"targets": ALL},
    "qwen3": {"targets": ALL},
    "gemma2": {
        "targets": ALL,
        "base_config": {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    },
    "gemma3_text": {"targets": [*ALL, "embed_tokens"], "base_config": GEMMA},
    "phi3": {"targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "olmo2": {"targets": ALL},
    "granite": {
        "targets": ALL,
        "base_config": {"embedding_multiplier": 2.0, "attention_multiplier": 0.4, "logits_scaling": 0.5},
    },
    "mixtral": {"targets": ATTENTION, "base_config": {**MOE, "num_local_experts": 4}},
    "qwen3_moe": {"targets": ATTENTION, "base_config": {**MOE, "num_experts": 4}},
    "gpt_neox": {"targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "gpt2": {"targets": ["c_attn", "c_proj", "c_fc"]},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, options) for name, options in FAMILIES.items()},
    "llama, embeddings": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "llama, head": ("llama", {"targets": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, tied": (
        "llama", {"targets": ["embed_tokens", "q_proj"], "base_config": {"tie_word_embeddings": True}}
    ),
    "gpt2, embeddings": ("gpt2", {"targets": ["wte", "wpe", "c_attn"]}),
    "gpt2, by layer": (
        "gpt2", {"targets": ["c_attn"], "base_config": {"scale_attn_by_inverse_layer_idx": True}}
    ),
    "gpt_neox, sequential": (
        "gpt_neox", {"targets": ["query_key_value"], "base_config": {"use_parallel_residual": False}}
    ),
}  # fmt: skip
# PEFT's X-LoRA only knows modules that begin with "model."
NO_PEFT = [name for name in VARIANTS if name.startswith("gpt") or name == "llama, head"]


def build(path: Path, architecture: str, **options: Any) -> Path:
    """Four named experts, a layerwise gate."""
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.1}
    return make_bundle(
        path, architecture=architecture, experts=["math", "code", "bio", "tales"], xlora=xlora, strength=0.3,
        head=2.0, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:fan_in_fan_out",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings",
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_and_scalings(tmp_path: Path, variant: str) -> None:
    architecture, options = VARIANTS[variant]
    tiny = Tiny(build(tmp_path / "bundle", architecture, **options))
    prompt = words(5, 21)
    engine = Engines(tiny.as_stored()).build(max_num_batched_tokens=8, max_num_seqs=4)
    other = greedy("other", words(6, 13), 20)  # a neighbour in the same batches
    ours = run(engine, [greedy("a", prompt, STEPS, return_scalings="full", scalings_start=0)], joins={2: [other]})["a"]
    text = prompt + ours.tokens[:-1]
    oracle = TwoPassOracle(tiny.path) if variant in NO_PEFT else tiny.oracle
    logits, scalings = oracle.forward(text)
    best = logits[len(prompt) - 1 :].topk(2)
    clear = best.values[:, 0] - best.values[:, 1] >= 1e-3
    assert len(ours.tokens) == STEPS
    assert clear.sum() >= STEPS - 2
    assert torch.equal(best.indices[clear, 0], torch.tensor(ours.tokens)[clear])
    np.testing.assert_allclose(ours.full, scalings, atol=1e-4, rtol=0)
    spread = scalings.amax(-1) - scalings.amin(-1)
    assert spread.mean() > 0.1  # a gate that says the same everywhere would prove nothing
    plain = TwoPassModel(tiny.checkpoint, device=CPU, dtype=torch.float32)
    assert_same(plain.forward(text), (logits, scalings))  # what check --verify compares with
