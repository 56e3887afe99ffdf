"""Good bundles load, and what is loaded equals what PEFT itself makes of the same files."""

from __future__ import annotations

import hashlib
import json
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.checkpoint import DraftLayerWeights, XLoraConfig, describe, load_checkpoint, write_bundle
from service.checkpoint.formats.writer import add_drafts, convert
from service.contract.errors import CheckpointError
from service.contract.options import EngineOptions
from service.engine.loader import load_engine
from service.model.loading.passes import load_model
from tests.support.bundles import make_bundle
from tests.support.damage import edit_json, edit_tensors, link_outside, poison


def peft_layers(bundle: Path, expert: str) -> dict[str, LoraLayer]:
    """{site: PEFT's layer} of the adapter loaded by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(bundle / "base")
    model = PeftModel.from_pretrained(base, bundle / "experts" / expert).get_base_model()
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_scales_and_sites_equal_pefts(pristine: Path) -> None:
    """Mixed ranks, targets, rsLoRA, rank and alpha patterns."""
    checkpoint = load_checkpoint(pristine)
    assert [expert.name for expert in checkpoint.experts] == ["alpha", "beta", "gamma"]
    for expert in checkpoint.experts:
        theirs = peft_layers(pristine, expert.name)
        assert set(expert.weights) == set(theirs)
        for site, ours in expert.weights.items():
            layer: Any = theirs[site]
            assert ours.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
            torch.testing.assert_close(ours.a[...], layer.lora_A["default"].weight.detach())
            torch.testing.assert_close(ours.b[...], layer.lora_B["default"].weight.detach())
    gamma = checkpoint.experts[2].weights
    assert {gamma[f"model.layers.{layer}.self_attn.v_proj"].rank for layer in (0, 1)} == {
        3,
        5,
    }  # the case is not vacuous


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sites_are_in_the_order_of_pefts_xlora_layers(pristine: Path) -> None:
    """PEFT numbers its X-LoRA layers by walking `modules()` after all adapters are in: row s of the gate is site s."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(pristine / "base"), pristine / "experts/alpha", adapter_name="0"
    )
    for number, name in enumerate(("beta", "gamma"), 1):
        model.load_adapter(pristine / "experts" / name, adapter_name=str(number))
    theirs = [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    assert load_checkpoint(pristine).sites == tuple(theirs)


def test_the_rest_of_the_checkpoint(pristine: Path) -> None:
    checkpoint = load_checkpoint(pristine)
    assert checkpoint.name == "tiny"
    assert checkpoint.base_path == pristine / "base"
    assert checkpoint.tokenizer_path.is_file()
    assert checkpoint.gate_profile == {"entropy": 0.5}
    assert checkpoint.xlora == XLoraConfig(hidden_size=32, xlora_size=24, xlora_depth=3, layerwise_scalings=True)
    assert checkpoint.sites is not None
    shapes = [list(weight.shape) for weight, _ in checkpoint.classifier.layers]
    assert shapes == [[24, 32], [24, 24], [len(checkpoint.sites) * 3, 24]]
    assert all(weight.dtype == torch.float32 and bias is not None for weight, bias in checkpoint.classifier.layers)
    assert all(file.verified for file in checkpoint.weight_files)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "phi3"])
def test_other_families(tmp_path: Path, architecture: str) -> None:
    bundle = make_bundle(tmp_path / "b", architecture=architecture, experts=["x", "y"], targets="all-linear")
    assert load_checkpoint(bundle).experts[1].name == "y"


def test_tied_lm_head_can_be_adapted(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", experts=["x"], targets=["q_proj"], base_config={"tie_word_embeddings": True})
    expert = bundle / "experts/x"
    prefix = "base_model.model.lm_head.lora_"
    head = {f"{prefix}A.weight": torch.ones(4, 32), f"{prefix}B.weight": torch.ones(320, 4)}
    edit_tensors("adapter_model.safetensors", lambda tensors: tensors.update(head))(expert)
    edit_json("bundle.json", lambda data: [data.pop("sha256"), data["sites"].append("lm_head")])(bundle)
    assert "lm_head" in load_checkpoint(bundle).experts[0].weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = load_checkpoint(make_bundle(tmp_path / "b", dtype=dtype))
    assert checkpoint.experts[0].weights["model.layers.0.self_attn.q_proj"].a.dtype == dtype
    assert checkpoint.classifier.layers[0][0].dtype == torch.float32


@pytest.mark.parametrize("infix", [".default", ".math"])
def test_tensor_names_with_an_adapter_name(bundle: Path, infix: str) -> None:
    def add_infix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", f"{infix}.weight")] = tensors.pop(name)

    before = {site: lora.b[...] for site, lora in load_checkpoint(bundle).experts[0].weights.items()}
    edit_tensors("experts/alpha/adapter_model.safetensors", add_infix)(bundle)
    after = load_checkpoint(bundle).experts[0].weights
    assert set(before) == set(after)
    assert all(torch.equal(before[site], after[site].b[...]) for site in before)


def shard_base(bundle: Path) -> None:
    """Split base/model.safetensors into two shards and an index."""
    base = bundle / "base"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, base / shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_base(bundle: Path) -> None:
    shard_base(bundle)
    labels = [file.label for file in load_checkpoint(bundle).weight_files]
    assert labels[:2] == ["base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors"]


def test_sharded_base_with_a_missing_shard_and_with_a_missing_tensor(bundle: Path) -> None:
    shard_base(bundle)
    shard = bundle / "base/model-00002-of-00002.safetensors"
    edit_tensors(shard.name, lambda tensors: tensors.pop("model.norm.weight", None) or tensors.popitem())(shard.parent)
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00002.safetensors: missing tensor '.*index.json expects"
    ):
        load_checkpoint(bundle)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: expected a file, found nothing"):
        load_checkpoint(bundle)


def test_without_sites_the_order_is_left_open(tmp_path: Path) -> None:
    assert load_checkpoint(make_bundle(tmp_path / "b", with_sites=False)).sites is None


def test_no_bias_and_no_relu(tmp_path: Path) -> None:
    xlora = {"use_bias": False, "enable_relu_and_dropout": False, "xlora_depth": 4}
    bundle = make_bundle(tmp_path / "b", xlora=xlora)
    names = set(load_file(bundle / "classifier/xlora_classifier.safetensors"))
    assert names == {"inner.0.weight", "inner.1.weight", "inner.2.weight", "last.weight"}
    assert [bias for _, bias in load_checkpoint(bundle).classifier.layers] == [None] * 4


def test_inner_layers_are_ordered_as_numbers_not_as_text(tmp_path: Path) -> None:
    """With ReLU and Dropout in between, depth 6 has inner.0, 3, 6, 9, 12: as text 12 would come before 3."""
    bundle = make_bundle(tmp_path / "b", xlora={"xlora_depth": 6})
    tensors = load_file(bundle / "classifier/xlora_classifier.safetensors")
    layers = load_checkpoint(bundle).classifier.layers
    for (weight, _), number in zip(layers, (0, 3, 6, 9, 12), strict=False):
        torch.testing.assert_close(weight, tensors[f"inner.{number}.weight"])


def test_combined_hash_depends_on_every_weight_file(pristine: Path, bundle: Path) -> None:
    before = load_checkpoint(pristine).weights_sha256
    assert load_checkpoint(bundle).weights_sha256 == before  # recorded or computed
    edit_tensors("experts/beta/adapter_model.safetensors", lambda tensors: [t.mul_(2) for t in tensors.values()])(
        bundle
    )
    assert load_checkpoint(bundle).weights_sha256 != before


def test_hashes_are_those_of_the_files(pristine: Path) -> None:
    for file in load_checkpoint(pristine).weight_files:
        content = (pristine / file.label).read_bytes()
        assert (file.sha256, file.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_weights_are_compared_while_others_read_them(hashed: Path) -> None:
    """Every file that bundle.json has a hash for: of the base, of experts, and one that nothing uses."""
    whole = load_checkpoint(hashed)
    lazy = load_checkpoint(hashed, examine_weights=False)
    assert lazy.weight_files == ()
    assert lazy.weights_sha256 == whole.weights_sha256  # as stated
    assert lazy.files is not None
    with lazy.files.verifying():
        pass
    for file in ("base/model.safetensors", "experts/beta/adapter_model.safetensors", "classifier/more.safetensors"):
        if not (hashed / file).exists():
            save_file({"x": torch.ones(1)}, hashed / file)
            edit_json("bundle.json", lambda data, file=file: data["sha256"].update({file: "0" * 64}))(hashed)
        else:
            content = (hashed / file).read_bytes()
            (hashed / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        lazy = load_checkpoint(hashed, examine_weights=False)
        assert lazy.files is not None
        with pytest.raises(CheckpointError, match=f"{file}: sha256: expected"), lazy.files.verifying():
            pass
        if file != "classifier/more.safetensors":
            (hashed / file).write_bytes(content)


def test_a_hash_that_nobody_states_is_computed_later(bundle: Path) -> None:
    whole, lazy = load_checkpoint(bundle), load_checkpoint(bundle, examine_weights=False)
    assert lazy.weights_sha256 is None
    assert lazy.files is not None
    known: queue.Queue[str] = queue.Queue()
    lazy.files.hash_weights(known.put)
    assert known.get(timeout=30) == whole.weights_sha256
    assert lazy.files.fingerprint == load_checkpoint(bundle, examine_weights=False).files.fingerprint  # type: ignore[union-attr]


def test_a_file_that_goes_away_before_it_is_read(bundle: Path) -> None:
    checkpoint = load_checkpoint(bundle, examine_weights=False)
    (bundle / "experts/beta/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"beta/adapter_model.safetensors: not readable: No such file"):
        load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("base/model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        ("base/model.safetensors", "model.norm.weight"),
        ("experts/beta/adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"),
    ],
)
def test_nan_is_found_when_weights_are_read(bundle: Path, file: str, tensor: str) -> None:
    poison(file, tensor, float("nan"))(bundle)
    with pytest.raises(CheckpointError, match=f"{file}: tensor '{tensor}': expected finite values, found NaN"):
        load_engine(EngineOptions(str(bundle), "cpu", threads=1, native_kernels=False))


def test_allow_outside(bundle: Path) -> None:
    link_outside("experts/alpha")(bundle)
    shutil.move(bundle / "base", bundle.parent / "elsewhere")
    edit_json("bundle.json", lambda data: data.update(base=str(bundle.parent / "elsewhere")))(bundle)
    with pytest.raises(CheckpointError, match="outside the bundle"):
        load_checkpoint(bundle)
    assert load_checkpoint(bundle, allow_outside=True).base_path == bundle.parent / "elsewhere"


def test_a_bundle_reached_through_a_symlink_is_inside_itself(bundle: Path) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    assert load_checkpoint(bundle.parent / "link").name == "tiny"


def test_two_experts_may_share_one_adapter(hashed: Path) -> None:
    def same(data: dict[str, Any]) -> None:
        data["experts"][2]["path"] = data["experts"][1]["path"]
        data["sites"] = None

    edit_json("bundle.json", same)(hashed)
    edit_json("classifier/xlora_config.json", lambda data: data.update(layerwise_scalings=False))(hashed)
    edit_tensors(
        "classifier/xlora_classifier.safetensors",
        lambda tensors: tensors.update({"last.weight": torch.ones(3, 24), "last.bias": torch.ones(3)}),
    )(hashed)
    edit_json("bundle.json", lambda data: data["sha256"].pop("classifier/xlora_classifier.safetensors"))(hashed)
    checkpoint = load_checkpoint(hashed)
    assert set(checkpoint.experts[1].weights) == set(checkpoint.experts[2].weights)
    assert [file.verified for file in checkpoint.weight_files] == [True, False, True, True, True, True, True]


def test_writer_is_idempotent(hashed: Path) -> None:
    checkpoint = load_checkpoint(hashed)
    before = (hashed / "bundle.json").read_bytes()
    write_bundle(
        hashed,
        name=checkpoint.name,
        experts=[(expert.name, expert.description, f"experts/{expert.name}") for expert in checkpoint.experts],
        sites=checkpoint.sites or (),
        xlora=checkpoint.xlora,
        classifier=checkpoint.classifier.layers,
        gate_profile=checkpoint.gate_profile,
        draft_head=checkpoint.draft_head,
        draft_layer=checkpoint.draft_layer,
    )
    assert (hashed / "bundle.json").read_bytes() == before


def test_builder_is_seeded_and_its_tokenizer_is_complete(pristine: Path, tmp_path: Path) -> None:
    xlora = {"xlora_depth": 3, "layerwise_scalings": True}
    again = make_bundle(tmp_path / "tiny", xlora=xlora, draft_head=6, draft_depth=3)
    assert load_checkpoint(again).weights_sha256 == load_checkpoint(pristine).weights_sha256
    tokenizer = AutoTokenizer.from_pretrained(again / "base")
    text = "naïve 日本語 😀 zebra\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= json.loads((again / "base/config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("missing", ["draft_head.safetensors", "draft_layer.safetensors"])
def test_a_bundle_may_have_either_draft(bundle: Path, missing: str) -> None:
    (bundle / "draft_head" / missing).unlink()
    checkpoint = load_checkpoint(bundle)
    assert (checkpoint.draft_head is None) == (missing == "draft_head.safetensors")
    assert (checkpoint.draft_layer is None) == (missing == "draft_layer.safetensors")
    assert "absent; xlora-serve distill makes one" in describe(checkpoint)


def test_a_draft_layer_comes_back_as_it_was_written(hashed: Path) -> None:
    """In bfloat16, its agreement in float32 whatever the dtype of the rest."""
    layer = load_checkpoint(hashed).draft_layer
    assert layer is not None
    assert layer.agreement.tolist() == pytest.approx([0.9, 0.75, 0.6])
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in layer.tensors().items()}
    add_drafts(hashed, None, DraftLayerWeights(**narrow, agreement=layer.agreement.to(torch.bfloat16)))
    checkpoint = load_checkpoint(hashed)
    assert checkpoint.draft_layer is not None
    assert all(file.verified for file in checkpoint.weight_files)
    for name, tensor in checkpoint.draft_layer.tensors().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, narrow[name])
    assert checkpoint.draft_layer.agreement.dtype == torch.float32
    assert "draft layer  depth 3, agreement .90 .75 .60, 16 wide" in describe(checkpoint)


def test_conversion_keeps_the_drafts(hashed: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(hashed)
    copy = load_checkpoint(convert(checkpoint, tmp_path / "copy", checkpoint.sites or ()))
    assert checkpoint.draft_head is not None
    assert checkpoint.draft_layer is not None
    assert copy.draft_head is not None
    assert copy.draft_layer is not None
    assert torch.equal(copy.draft_head.up, checkpoint.draft_head.up)
    for name, tensor in checkpoint.draft_layer.tensors().items():
        assert torch.equal(copy.draft_layer.tensors()[name], tensor)
    assert torch.equal(copy.draft_layer.agreement, checkpoint.draft_layer.agreement)
