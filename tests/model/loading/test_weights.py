"""Weights that are placed layer by layer are those of from_pretrained: values, dtypes, ties, buffers and constants."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from service.checkpoint.base import read_base
from service.checkpoint.defects import Defects
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import StoredTensor
from service.model.loading.skeleton import build_skeleton, inspect_base, read_config
from service.model.loading.weights import place_weights
from tests.support.bundles import make_base, make_tokenizer
from tests.support.tiny import CPU

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
TIED = {"tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, biases": ("llama", {**TIED, "attention_bias": True, "mlp_bias": True}),
    "gemma3_text": ("gemma3_text", TIED),
    "gpt2": ("gpt2", {**GPT, **TIED}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "gpt_neox", "granite")},
    **{name: (name, {}) for name in ("olmo", "olmo2", "starcoder2", "cohere", "cohere2", "smollm3")},
    **{name: (name, {}) for name in ("exaone4", "seed_oss", "apertus", "arcee", "helium", "glm", "glm4")},
    "gemma2": ("gemma2", TIED),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save(path: Path, architecture: str, overrides: dict[str, Any], dtype: torch.dtype) -> None:
    """A base in several files, its vectors random as well."""
    tokenizer = make_tokenizer(320)
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": 32, "layers": 2, "vocab": 320}
    base = make_base(
        architecture, **sizes, generator=generator, dtype=torch.float32, tokenizer=tokenizer, overrides=overrides
    )
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 1)
    base = copy.deepcopy(base).to(dtype)
    base.config.dtype = dtype
    base.save_pretrained(path, max_shard_size="40KB")
    tokenizer.save_pretrained(path)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return dict(itertools.chain(*named))


def ties_of(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(tied for tied in names.values() if len(tied) > 1)


def constants_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor | float)
    }


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_placed_weights_are_from_pretrained_s(tmp_path: Path, family: str, stored: torch.dtype) -> None:
    save(tmp_path, *{**FAMILIES, **MORE}[family], stored)
    base = read_base(BundleRoot(tmp_path, allow_outside=True), tmp_path, Defects())
    inspect_base(base)
    tensors = {name: StoredTensor(file, info) for file in base.files for name, info in file.tensors.items()}
    for dtype in DTYPES:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, config=read_config(tmp_path), dtype=dtype)
        ours = build_skeleton(tmp_path, dtype)
        place_weights(ours, tensors, CPU)
        expected, found = tensors_of(theirs), tensors_of(ours)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
        assert ties_of(ours) == ties_of(theirs)
        constants = constants_of(ours)
        for place, value in constants_of(theirs).items():
            equal = (
                torch.equal(constants[place], value) if isinstance(value, torch.Tensor) else constants[place] == value
            )
            assert equal, place
