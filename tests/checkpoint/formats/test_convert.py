"""xlora-serve convert, and export from a live PEFT model: what is written is the model that was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from service.checkpoint import export, load_checkpoint
from service.cli import main
from service.contract.errors import CheckpointError
from service.model.loading.passes import load_model
from tests.checkpoint.formats.test_layouts import FIXTURES, ORIGINAL, SOUND, assert_equals_live
from tests.checkpoint.test_loading import shard_base
from tests.support.bundles import make_bundle
from tests.support.oracle import PeftOracle
from tests.support.tiny import assert_same, run_once

TOKENS = [3, 17, 200, 5, 29, 11, 2, 301]
BASE = str(FIXTURES / "base")


@pytest.mark.parametrize("source", [SOUND / "depth2", ORIGINAL / "depth4"], ids=lambda path: path.parent.name)
def test_convert(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any layout becomes a bundle that stands alone: hashes and sites written, names ordinary, paths inside."""
    target = tmp_path / "deep/bundle"
    assert main(["convert", str(source), str(target), "--base", BASE]) == 0
    assert f"{target}: " in capsys.readouterr().out
    assert_equals_live(target, source)
    checkpoint = load_checkpoint(target)
    assert checkpoint.sites is not None
    assert all(file.verified for file in checkpoint.weight_files)
    for expert in checkpoint.experts:
        assert expert.config["base_model_name_or_path"] == "../../base"
        assert all(
            name.startswith("base_model.model.model.")
            for name in load_file(expert.folder / "adapter_model.safetensors")
        )
    assert [path.name for path in tmp_path.glob("deep/*")] == ["bundle"]


def test_convert_a_bundle_is_the_identity(hashed: Path, tmp_path: Path) -> None:
    assert main(["convert", str(hashed), str(tmp_path / "again")]) == 0
    assert load_checkpoint(tmp_path / "again").weights_sha256 == load_checkpoint(hashed).weights_sha256
    ours, theirs = (json.loads((path / "bundle.json").read_text()) for path in (tmp_path / "again", hashed))
    assert {**ours, "sha256": 0} == {**theirs, "sha256": 0}


def test_reference_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SOUND / "depth1"), str(tmp_path / "b"), "--base", BASE, "--reference-base"]) == 0
    assert "serve with --allow-outside" in capsys.readouterr().out
    assert not (tmp_path / "b/base").exists()
    with pytest.raises(CheckpointError, match="outside the bundle"):
        load_checkpoint(tmp_path / "b")
    assert_equals_live(tmp_path / "b", SOUND / "depth1", allow_outside=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_dtype(tmp_path: Path, bundle: Path, sharded: bool) -> None:
    """Base and experts are cast, the classifier is not."""
    if sharded:
        shard_base(bundle)
    assert main(["convert", str(bundle), str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    before, after = load_checkpoint(bundle), load_checkpoint(tmp_path / "b")
    assert json.loads((after.base_path / "config.json").read_text())["dtype"] == "bfloat16"
    for ours, theirs in zip(after.experts, before.experts, strict=True):
        for site, weights in ours.weights.items():
            assert torch.equal(weights.a[...], theirs.weights[site].a[...].bfloat16())
            assert weights.scale == theirs.weights[site].scale
    assert all(map(torch.equal, *([weight for weight, _ in c.classifier.layers] for c in (before, after))))
    model = load_model(after, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert run_once(model, TOKENS)[0].isfinite().all()


def test_a_failure_leaves_nothing(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert main(["convert", str(bundle), str(tmp_path / "full")]) == 1
    assert "full: expected a new or an empty folder" in capsys.readouterr().err
    (bundle / "classifier/xlora_classifier.safetensors").unlink()
    assert main(["convert", str(bundle), str(tmp_path / "target")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", bundle.name]


LIVE: dict[str, dict[str, Any]] = {
    "depth 1": {"xlora": {"xlora_depth": 1}},
    "layerwise": {"xlora": {"xlora_depth": 3, "layerwise_scalings": True, "xlora_dropout_p": 0.0, "top_k_lora": 2}},
    "tied head": {"base_config": {"tie_word_embeddings": True}, "xlora": {"softmax_temperature": 0.5}},
    "embeddings": {
        "experts": ["a", "b", "c"],
        "targets": ["embed_tokens", "q_proj"],
        "xlora": {"layerwise_scalings": True},
    },
    "qwen3": {"architecture": "qwen3", "xlora": {"enable_softmax": False, "global_scaling_weight": 0.4}},
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", LIVE)
def test_export_is_exact(tmp_path: Path, case: str) -> None:
    """Through our model, the exported bundle has the logits and scalings of the model in memory."""
    bundle = make_bundle(tmp_path / "source", **LIVE[case])
    live = PeftOracle(bundle)
    before = live.forward(TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(bundle / "base")
    target = export(live.model, tokenizer, tmp_path / "out", expert_names=["math", "code/python", "bio"])
    checkpoint = load_checkpoint(target)
    assert [expert.name for expert in checkpoint.experts] == ["math", "code/python", "bio"]
    assert list(checkpoint.sites or ()) == live.sites
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert_same(run_once(model, TOKENS), before)
    assert main(["convert", str(target), str(tmp_path / "again")]) == 0
    assert load_checkpoint(tmp_path / "again").weights_sha256 == checkpoint.weights_sha256
    assert_same(live.forward(TOKENS), before, tolerance=0)  # the live model stays as it was


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_writes_what_the_model_does_now(tmp_path: Path) -> None:
    """Scales and gate settings that were changed after loading, in bfloat16, with the base by reference."""
    bundle = make_bundle(tmp_path / "source", xlora={"xlora_depth": 2, "layerwise_scalings": True})
    live = PeftOracle(bundle)
    layer = next(module for module in live.model.modules() if "1" in getattr(module, "lora_A", {}))
    layer.scaling["1"] *= 1.7
    live.xlora.set_scaling_pass_value(None)
    live.xlora.set_global_scaling_weight(1.3)
    live.xlora.set_topk_lora(2)
    before = live.forward(TOKENS)
    target = export(live.model, None, tmp_path / "out", base=str(bundle / "base"), name="mine")
    checkpoint = load_checkpoint(target, allow_outside=True)
    assert checkpoint.name == "mine"
    assert [expert.name for expert in checkpoint.experts] == ["0", "1", "2"]
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert_same(run_once(model, TOKENS), before)
    live.model.bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(bundle / "base")
    checkpoint = load_checkpoint(export(live.model, tokenizer, tmp_path / "bf16"))
    stored = load_file(checkpoint.base_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert checkpoint.experts[0].weights["model.layers.0.self_attn.q_proj"].a.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_refuses_what_a_bundle_cannot_hold(tmp_path: Path) -> None:
    live = PeftOracle(make_bundle(tmp_path / "source"))
    layer = next(module for module in live.model.modules() if hasattr(module, "lora_A"))
    with pytest.raises(CheckpointError, match="expected an X-LoRA model of PEFT, found LlamaForCausalLM"):
        export(live.xlora.lora_model.model, None, tmp_path / "out")
    for names in (["a", "b"], ["a", "b", "b"], ["a", "b", ""]):
        with pytest.raises(CheckpointError, match="expert_names: expected 3 different names"):
            export(live.model, None, tmp_path / "out", expert_names=names)
    layer.use_dora["0"] = True
    with pytest.raises(CheckpointError, match=r"q_proj: adapter '0' uses DoRA"):
        export(live.model, None, tmp_path / "out", base="org/base")
    layer.use_dora["0"] = False
    layer.merged_adapters.append("0")
    with pytest.raises(CheckpointError, match=r"q_proj: expected adapters that are not merged"):
        export(live.model, None, tmp_path / "out", base="org/base")
    layer.merged_adapters.clear()
    live.xlora.lora_model.peft_config["1"].init_lora_weights = "pissa"
    with pytest.raises(CheckpointError, match=r"init_lora_weights: .*found 'pissa'"):
        export(live.model, None, tmp_path / "out", base="org/base")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
