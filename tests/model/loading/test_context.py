"""The context of a base whose RoPE is scaled: how long it is, and transformers' numbers all along it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from service.contract.errors import CheckpointError, SettingsError
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.loader import build_engine, load_checkpoint_and_model
from service.engine.sizing import divide_memory
from service.model.loading.context import MAX_TOKENS, Context, read_context
from service.model.xlora_model import XLoraModel
from service.native.step import NativeStep
from tests.support.bundles import make_bundle
from tests.support.damage import edit_json
from tests.support.driver import run, words
from tests.support.tiny import CPU, Tiny, assert_same, load_base, run_once

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "original_max_position_embeddings": 64},
    "yarn without its original length": {"rope_type": "yarn"},
    "yarn, attention scaled": {"rope_type": "yarn", "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "original_max_position_embeddings": 64},
    "linear without its original length": {"rope_type": "linear"},
}
OLDER = ("linear", "yarn")  # whose config.json is written as older libraries wrote it


def config_of(stated: int, model_type: str = "llama", **rope: Any) -> Any:
    by_layer_type = any(isinstance(value, dict) for value in rope.values())
    parameters = rope if by_layer_type else {"rope_theta": 10000.0, **rope}
    return AutoConfig.for_model(model_type, max_position_embeddings=stated, rope_parameters=parameters)


@pytest.mark.parametrize(
    ("config", "usual", "most"),
    [
        pytest.param(config_of(8192, rope_type="default"), 8192, 8192, id="plain"),
        pytest.param(
            config_of(32768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
            131072, 131072, id="Qwen 2.5",
        ),
        pytest.param(
            config_of(32768, rope_type="yarn", factor=16.0, original_max_position_embeddings=8192),
            131072, 131072, id="Yarn Mistral",
        ),
        pytest.param(
            config_of(163840, rope_type="yarn", factor=40, original_max_position_embeddings=4096),
            163840, 163840, id="DeepSeek V3",
        ),
        pytest.param(
            config_of(131072, **LLAMA3, factor=32.0, original_max_position_embeddings=8192),
            131072, 131072, id="Llama 3.2",
        ),
        pytest.param(
            config_of(131072, **LLAMA3, factor=8.0, original_max_position_embeddings=8192),
            131072, 131072, id="Llama 3.1",
        ),
        pytest.param(config_of(4096, rope_type="linear", factor=4.0), 4096, 16384, id="Vicuna 16k"),
        pytest.param(config_of(64, rope_type="yarn", factor=0.5), 64, 64, id="shortened"),
        pytest.param(config_of(64, rope_type="yarn", factor=1e300), MAX_TOKENS, MAX_TOKENS, id="boundless"),
        pytest.param(
            config_of(
                1024, "gemma3_text",
                full_attention={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                sliding_attention={"rope_type": "default", "rope_theta": 1e4},
            ),
            1024, 1024, id="by layer type",
        ),
        pytest.param(AutoConfig.for_model("gpt2", n_positions=128), 128, 128, id="learned positions"),
    ],
)  # fmt: skip
def test_the_length_that_config_json_means(config: Any, usual: int, most: int) -> None:
    assert read_context(config) == Context(usual, most)


@pytest.mark.parametrize("stated", [0, 1, MAX_TOKENS + 1])
def test_a_length_that_is_none(stated: int) -> None:
    config = config_of(64, rope_type="default")
    config.max_position_embeddings = stated
    with pytest.raises(CheckpointError, match=r"/config.json: max_position_embeddings: expected a whole number"):
        read_context(config)


@pytest.fixture(scope="module", params=KINDS)
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Trained on 64 tokens and made for 256 by its RoPE."""
    rope = {"rope_theta": 10000.0, "factor": 4.0, **KINDS[request.param]}
    config = {"rope_parameters": rope, "max_position_embeddings": 64}
    path = make_bundle(tmp_path_factory.mktemp("scaled") / "bundle", base_config=config, head=1.5)
    if request.param in OLDER:
        edit_json("base/config.json", write_as_before)(path)
    return Tiny(path)


def write_as_before(config: dict[str, Any]) -> None:
    """RoPE as it stands in most files on the hub: two fields, and another name for the kind."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}


def test_numbers_are_those_of_transformers_past_the_original_length(scaled: Tiny) -> None:
    base = load_base(scaled.checkpoint, torch.float32, 256)
    model = XLoraModel(scaled.checkpoint, base, device=CPU, dtype=torch.float32)
    tokens = words(3, 250)
    assert_same(run_once(model, tokens, [60, 5, 185]), scaled.oracle.forward(tokens))


def test_a_text_may_be_four_times_as_long(scaled: Tiny) -> None:
    """Greedy tokens from short of the original length to past it, and from past it, by both ways to compute a step."""
    expected = {length: scaled.oracle.greedy(words(length, length), 8)[0] for length in (60, 220)}
    for is_native in (True, False):
        options = EngineOptions(str(scaled.path), "cpu", max_model_len=256, max_num_seqs=2, native_kernels=is_native)
        model, checkpoint = load_checkpoint_and_model(options)
        engine = build_engine(model, checkpoint, options, wait_for_native=True)
        assert isinstance(engine.runner.step, NativeStep) == is_native
        for length in (60, 220):
            sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            choice = run(engine, [Request(str(length), words(length, length), sampling)])[str(length)]
            assert choice.tokens == expected[length]
    with pytest.raises(SettingsError, match="--max-model-len 257 is over the 256 tokens"):
        divide_memory(model, EngineOptions("", max_model_len=257), CPU, None)
