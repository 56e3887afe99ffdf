"""Two processes that each have half of a model compute what one does, for every family that has a plan.

One pair of processes runs several families one after another (tensor_parallel_rank.py); the oracle is the undivided
model. `make test` has one family of each kind of plan, `make test-slow` the rest.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.distributed.tensor_parallel import ColwiseParallel

from service.checkpoint import load_checkpoint
from service.contract.errors import CheckpointError, SettingsError
from service.model.loading.parallel_plan import Ranks, check_plan
from service.model.loading.passes import load_model
from service.model.loading.skeleton import build_skeleton, check_divisible
from tests.model.loading.test_families import FAMILIES, build
from tests.support.bundles import make_bundle
from tests.support.driver import words
from tests.support.tensor_parallel_rank import CHUNKS, LENGTH, matrix_bytes
from tests.support.tiny import CPU, OneRequest

ROOT = Path(__file__).parents[3]
LEFT_OUT = {"gpt2", "granite", "qwen3_moe"}  # has no plan; are divided as Llama and Mixtral are
WHOLE_ATTENTION = {"phi3", "olmo2"}  # fused projections, norms over all heads: every rank attends with all heads
# transformers 5.17 gathers only what divides evenly
VOCABULARY = 320 if "validate_param" in vars(ColwiseParallel) else 321
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, options) for name, options in FAMILIES.items() if name not in LEFT_OUT},
    "head": ("llama", {"targets": ["embed_tokens", "lm_head", "o_proj"], "vocab": VOCABULARY}),
    "tied": ("llama", {"targets": ["embed_tokens", "q_proj"], "base_config": {"tie_word_embeddings": True}}),
    "biased": ("llama", {"targets": ["o_proj"], "base_config": {"attention_bias": True, "mlp_bias": True}}),
}


ONE_OF_EACH = ["llama", "phi3", "gpt_neox", "olmo2", "mixtral", "head", "tied", "biased"]
REST = [name for name in BUNDLES if name not in ONE_OF_EACH]
NAMES = [
    *(pytest.param(True, name, id=name) for name in ONE_OF_EACH),
    *(pytest.param(False, name, id=name, marks=pytest.mark.slow) for name in REST),
]


@pytest.fixture(scope="module")
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of ONE_OF_EACH, or the rest."""
    root = tmp_path_factory.mktemp("bundles")
    xlora = {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.1}
    shared = {"experts": ["math", "bio"], "xlora": xlora, "strength": 0.3, "head": 2.0, "draft_head": 4}
    return {
        name: make_bundle(root / name, architecture=architecture, **shared, **options)
        for name, (architecture, options) in BUNDLES.items()
        if (name in ONE_OF_EACH) == request.param
    }


@pytest.fixture(scope="module")
def outcome(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have saved what they computed."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        command = [sys.executable, "-m", "tests.support.tensor_parallel_rank"]
        arguments = [str(port), str(out), *map(str, bundles.values())]
        ranks = [
            subprocess.Popen([*command, str(rank), "2", *arguments], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            for rank in range(2)
        ]
        try:
            assert [rank.wait(600) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        del store
    return out


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings"
)
@pytest.mark.parametrize(("bundles", "name"), NAMES, indirect=["bundles"], scope="module")
def test_two_ranks_compute_what_one_process_does(bundles: dict[str, Path], outcome: Path, name: str) -> None:
    model = load_model(load_checkpoint(bundles[name]), device=CPU, dtype=torch.float32)
    request = OneRequest(model, LENGTH)
    logits, scalings = request.run(words(5, LENGTH), CHUNKS)
    ranks = [load_file(outcome / f"{name}.{rank}") for rank in range(2)]
    torch.testing.assert_close(ranks[0]["scalings"], scalings, atol=1e-5, rtol=0)
    torch.testing.assert_close(ranks[0]["logits"], logits, atol=1e-4, rtol=0)
    best = logits.topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-3
    assert torch.equal(ranks[0]["logits"].argmax(-1)[clear], best.indices[clear, 0])
    for found in ("logits", "scalings", "gate_rows"):  # top-k at a near-tie must not differ between ranks: equal bits
        torch.testing.assert_close(ranks[1][found], ranks[0][found], atol=0, rtol=0, equal_nan=True)
    heads = request.cache.keys[0].shape[2]
    assert ranks[0]["kv_heads"] == (heads if name in WHOLE_ATTENTION else heads // 2)
    assert ranks[1]["matrix_bytes"] < 0.7 * matrix_bytes(model)  # all of them halved, but perhaps embeddings


def test_ranks_share_a_dimension_as_torch_chunk_does() -> None:
    for length in (1, 5, 8, 321):
        parts = [list(range(length))[Ranks(rank, 3).chunk(length)] for rank in range(3)]
        theirs = [part.tolist() for part in torch.arange(length).chunk(3)]
        assert [part for part in parts if part] == theirs


def skeleton(path: Path, architecture: str = "llama", **config: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64}
    AutoConfig.for_model(architecture, **(sizes | config)).save_pretrained(path)
    return build_skeleton(path)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_family_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle", "gpt2", targets=["c_attn"])
    with pytest.raises(CheckpointError, match=r"no plan for the family 'gpt2'.*without --tensor-parallel"):
        check_divisible(load_checkpoint(bundle), 2)


@pytest.mark.parametrize(
    ("ranks", "architecture", "config", "reason"),
    [
        (3, "llama", {}, r"3 does not divide the base model's 4 attention heads \(hint: this model allows 1, 2\)"),
        (4, "llama", {}, r"4 does not divide the base model's 2 key/value heads \(hint: this model allows 1, 2\)"),
        (
            4,
            "gpt_neox",
            {"num_key_value_heads": 4, "intermediate_size": 50},
            "50 outputs of gpt_neox.layers.0.mlp.dense_h_to_4h.*allows 1, 2",
        ),
        (2, "llama", {"num_key_value_heads": 1}, r"1 key/value heads \(hint: this model allows 1\)"),
        (2, "mixtral", {"intermediate_size": 33}, r"33 features of .*experts.*allows 1\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(
    tmp_path: Path, ranks: int, architecture: str, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        check_plan(skeleton(tmp_path, architecture, **config), ranks, tmp_path)


@pytest.mark.parametrize(
    ("rule", "style", "reason"),
    [
        ("model.layers.*.mlp.up_proj", "packed_rowwise", "has model.layers.0.mlp.up_proj .Linear. as 'packed_rowwise'"),
        ("model.layers.*.self_attn", "local_params", "has model.layers.0.self_attn .LlamaAttention. as 'local_params'"),
        ("model.layers.*.self_attn.k_proj", "colwise_gather_output", "only some heads of model.layers.0.self_attn"),
    ],
)
def test_plans_that_ask_for_more_are_refused(tmp_path: Path, rule: str, style: str, reason: str) -> None:
    base = skeleton(tmp_path)
    base.tp_plan[rule] = style
    with pytest.raises(CheckpointError, match=reason):
        check_plan(base, 2, tmp_path)
