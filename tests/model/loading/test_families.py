"""Every decoder family: greedy tokens and scalings through the engine are PEFT's, with everything on that may go wrong.

No family has a file of ours; what differs between them (soft caps, windows, embedding scales, fused or transposed
weights, multipliers) is in transformers' modules, and this is where we would notice that one is not honoured.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from service.contract.errors import CheckpointError
from service.model.loading.family import refuse_unsupported
from service.model.loading.passes import load_model
from service.model.loading.skeleton import build_skeleton
from service.model.xlora_model import XLoraModel
from service.tools.two_pass import TwoPassModel
from tests.support.bundles import make_bundle
from tests.support.driver import Engines, greedy, run, words
from tests.support.tiny import CPU, Tiny, assert_same
from tests.support.two_pass import TwoPassOracle

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
    "llama, tied head": (
        "llama", {"targets": ["lm_head", "q_proj"], "base_config": {"tie_word_embeddings": True}}
    ),
    "gpt2, head": ("gpt2", {"targets": ["lm_head", "c_attn", "c_fc"]}),
    "gpt_neox, head": ("gpt_neox", {"targets": ["lm_head", "dense"]}),
    "gpt_neox, tied head": (
        "gpt_neox", {"targets": ["lm_head", "dense"], "base_config": {"tie_word_embeddings": True}}
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
NO_PEFT = [name for name in VARIANTS if name.startswith("gpt") or name.endswith("head")]


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
    again = run(engine, [greedy("b", prompt, STEPS, return_scalings="full", scalings_start=0)])["b"]
    assert again.usage is not None
    assert again.usage.cached_tokens > 0
    assert again.tokens == ours.tokens
    np.testing.assert_allclose(again.full, ours.full, atol=1e-5, rtol=0)
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


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("bloom", {}, "its attention does not go through transformers' attention interface"),
        ("mamba", {}, "its attention does not go through|layer 0 does not attend"),
        ("gpt_oss", {"num_local_experts": 4}, "its attention uses s_aux"),
        ("diffllama", {}, "layer 0 attends 2 times"),
        ("nemotron", {"num_key_value_heads": 4}, "it does not pass keyword arguments on to its attention"),
        ("deepseek_v3", {}, "layer 0 caches 4 heads with keys of 192 and values of 128"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "it has layers of the type conv"),
        ("bert", {"is_decoder": False}, "looks ahead"),
        ("opt", {"word_embed_proj_dim": 32}, "its head does not read the last hidden state of the whole decoder"),
        ("t5", {}, "transformers knows no causal language model for it"),
    ],
)
def test_families_that_cannot_be_served_exactly_are_refused_before_loading(
    tmp_path: Path, architecture: str, config: dict[str, Any], reason: str
) -> None:
    """Only config.json is there: no weight has been read when the reason is given."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    AutoConfig.for_model(architecture, **sizes, **config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        refuse_unsupported(build_skeleton(tmp_path), tmp_path)


def test_refusal_ends_loading(tmp_path: Path) -> None:
    checkpoint = Tiny(build(tmp_path / "bundle", "diffllama", targets=["q_proj"])).checkpoint
    with pytest.raises(CheckpointError, match=r"config.json: this decoder family cannot be served exactly: layer 0"):
        load_model(checkpoint, device=CPU, dtype=torch.float32)


def test_targets_that_are_not_plain_modules_are_refused(tmp_path: Path) -> None:
    """A subclass of Linear with a forward of its own, and an adapter of other sizes than the module."""
    tiny = Tiny(build(tmp_path / "bundle", "llama", targets=["q_proj"]))

    class Odd(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    base = copy.deepcopy(tiny.base(torch.float32))
    base.model.layers[1].self_attn.q_proj = Odd(32, 32)
    with pytest.raises(CheckpointError, match=r"'math' targets model.layers.1.self_attn.q_proj, which is Odd"):
        XLoraModel(tiny.checkpoint, base, device=CPU, dtype=torch.float32)
    base.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 64)
    with pytest.raises(CheckpointError, match=r"which is Linear of 32 x 64, not 32 x 32"):
        XLoraModel(tiny.checkpoint, base, device=CPU, dtype=torch.float32)
    base.model.layers[1].self_attn.q_proj = torch.nn.Embedding(32, 32)
    with pytest.raises(CheckpointError, match=r"which is Embedding, not what the adapter was made for"):
        XLoraModel(tiny.checkpoint, base, device=CPU, dtype=torch.float32)
