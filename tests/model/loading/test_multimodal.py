"""Bases of text with images: text experts of theirs are served as text, and their numbers are PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from service.checkpoint import XLoraConfig, load_checkpoint, write_bundle
from service.checkpoint.report import examine
from service.contract.errors import CheckpointError
from service.model.loading.passes import load_model
from service.model.loading.skeleton import inspect_base
from tests.support.bundles import make_tokenizer
from tests.support.driver import words
from tests.support.tiny import CPU, assert_same, run_once

# PEFT uses names that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEXT = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**TEXT, **WINDOWS}, "mm_tokens_per_image": 4},
    "llava": {"text_config": {**TEXT, "model_type": "llama"}},
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}},
}


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A bundle in tmp_path with one expert, whose weight is then 1: PEFT's plain adapter is the oracle."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vision_config=VISION, **WRAPPERS[request.param])
    base = AutoModelForImageTextToText.from_config(config)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer(320).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, lora_alpha=32, target_modules=["k_proj"], init_lora_weights=False)  # of the images' as well
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "experts/text")
    write_bundle(
        tmp_path,
        name=request.param,
        experts=[("text", "", "experts/text")],
        sites=[
            name.removesuffix(".lora_A.default")
            for name, _ in adapted.get_base_model().named_modules()
            if name.endswith("lora_A.default")
        ],
        xlora=XLoraConfig(hidden_size=32),
        classifier=[(torch.randn(1, 32), torch.zeros(1))],
    )
    return str(request.param)


@pytest.mark.parametrize("wrapper", ["gemma3"], indirect=True)
def test_a_decoder_of_text_is_served(tmp_path: Path, wrapper: str) -> None:
    assert examine(tmp_path, inspect_base=inspect_base)[1] == []
    model = load_model(load_checkpoint(tmp_path), device=CPU, dtype=torch.float32)
    tokens = words(5, 40)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    with torch.inference_mode():
        plain = base(input_ids=torch.tensor([tokens])).logits[0]
        theirs = PeftModel.from_pretrained(base, tmp_path / "experts/text").eval()
        logits = theirs(input_ids=torch.tensor([tokens])).logits[0]
    assert (plain - logits).abs().max() > 1e-2, "the expert changes hardly anything: the test shows little"
    assert_same(run_once(model, tokens, [25, 15]), (logits, torch.ones(40, 3, 1)))


@pytest.mark.parametrize("wrapper", ["llava", "mistral3"], indirect=True)
def test_what_transformers_has_no_decoder_for_is_refused_for_that(tmp_path: Path, wrapper: str) -> None:
    """By `check` and by loading, and for nothing else: the expert fits the base."""
    _, [problem] = examine(tmp_path, inspect_base=inspect_base)
    assert str(problem).startswith(f"{tmp_path}/base/config.json: transformers knows no causal language model for it")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, inspect_base=inspect_base)
    assert str(caught.value) == str(problem)
