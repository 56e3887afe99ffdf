"""Every defect is one line that names file, tensor, expected and found; one damage gives one defect."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from service.checkpoint import find_problems, load_checkpoint
from service.checkpoint.report import describe
from service.contract.errors import CheckpointError
from tests.support.damage import (
    Damage,
    cut,
    edit_json,
    edit_tensors,
    link_outside,
    poison,
    remove,
    rename,
    set_json,
    set_tensor,
    write,
)

BUNDLE = "bundle.json"
BASE = "base/model.safetensors"
ADAPTER = "experts/alpha/adapter_config.json"
EXPERT = "experts/alpha/adapter_model.safetensors"
CONFIG = "classifier/xlora_config.json"
GATE = "classifier/xlora_classifier.safetensors"
DRAFT = "draft_head/draft_head.safetensors"
LAYER = "draft_head/draft_layer.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
NAN, INF = float("nan"), float("inf")


def expert(index: int, **values: Any) -> Damage:
    return edit_json(BUNDLE, lambda data: data["experts"][index].update(values))


def move_q(tensors: dict[str, torch.Tensor]) -> None:
    """Rename the module q_proj of layer 0 to one that the base has not."""
    for side in "AB":
        tensors[f"{Q}{side}.weight".replace("q_proj", "q_prj")] = tensors.pop(f"{Q}{side}.weight")


def drop_both(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        del tensors[f"{Q}{side}.weight"]


def embedding_adapter(vocabulary: int) -> Any:
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    return lambda tensors: tensors.update({f"{prefix}A": torch.ones(4, vocabulary), f"{prefix}B": torch.ones(32, 4)})


def header(entry: Any) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


CASES: dict[str, tuple[Damage, list[str]]] = {
    # bundle.json
    "no bundle.json": (remove(BUNDLE), [BUNDLE, "expected a file, found nothing"]),
    "broken json": (write(BUNDLE, b'{"a": '), [BUNDLE, "broken JSON at line 1"]),
    "json of another type": (write(BUNDLE, b"[]"), [BUNDLE, "expected a JSON object, found list"]),
    "json not utf-8": (write(BUNDLE, b'{"a": "\xff"}'), [BUNDLE, "not readable as UTF-8"]),
    "json NaN": (write(BUNDLE, b'{"a": NaN}'), [BUNDLE, "NaN is not a JSON value"]),
    "json repeated key": (write(BUNDLE, b'{"a": 1, "a": 2}'), [BUNDLE, "repeated key 'a'"]),
    "json too deep": (write(BUNDLE, b"[" * 100_000), [BUNDLE, "not readable as JSON"]),
    "format version": (
        set_json(BUNDLE, format_version=2),
        [BUNDLE, "format_version: expected 1, found 2"],
    ),
    "format version true": (
        set_json(BUNDLE, format_version=True),
        ["format_version: expected 1, found True"],
    ),
    "unknown key": (
        set_json(BUNDLE, expert=[]),
        [BUNDLE, "unknown config key 'expert'", "did you mean 'experts'"],
    ),
    "no experts": (
        set_json(BUNDLE, experts=[]),
        [BUNDLE, "experts: expected a list of at least one", "found []"],
    ),
    "expert not an object": (
        edit_json(BUNDLE, lambda d: d["experts"].append(3)),
        [BUNDLE, "experts[3]: expected an object", "found 3"],
    ),
    "expert without path": (
        edit_json(BUNDLE, lambda d: d["experts"][1].pop("path")),
        ["experts[1].path", "missing"],
    ),
    "expert with unknown key": (
        expert(0, pth="x"),
        ["experts[0]: unknown config key 'pth'", "did you mean 'path'"],
    ),
    "duplicate names": (expert(1, name="alpha"), ["experts[1].name: 'alpha' is already taken"]),
    "name of two lines": (
        expert(1, name="a\nb"),
        ["experts[1].name: expected a non-empty string, found 'a\\nb'"],
    ),
    "sites of a wrong type": (
        set_json(BUNDLE, sites="q_proj"),
        [BUNDLE, "sites: expected a list", "found 'q_proj'"],
    ),
    "site twice": (
        edit_json(BUNDLE, lambda d: d["sites"].append(d["sites"][0])),
        [BUNDLE, "'model.layers.0.self_attn.q_proj' is listed 2 times"],
    ),
    "gate_profile of a wrong type": (
        set_json(BUNDLE, gate_profile=1),
        ["gate_profile: expected an object", "found 1"],
    ),
    # the draft head
    "draft_head of a wrong type": (
        set_json(BUNDLE, draft_head=["draft_head"]),
        [BUNDLE, "draft_head: expected a non-empty string, found ['draft_head']"],
    ),
    "draft_head that is not there": (
        set_json(BUNDLE, draft_head="elsewhere"),
        [BUNDLE, "draft_head: expected a folder at", "found nothing"],
    ),
    "draft_head outside": (
        set_json(BUNDLE, draft_head="../elsewhere"),
        ["draft_head", "outside the bundle"],
    ),
    "draft head's folder without files": (
        lambda bundle: [remove(file)(bundle) for file in (DRAFT, LAYER)],
        [DRAFT, "expected a file, found nothing"],
    ),
    "draft head without a tensor": (
        set_tensor(DRAFT, "up.bias", None),
        [DRAFT, "missing tensor 'up.bias'"],
    ),
    "draft head with another tensor": (
        set_tensor(DRAFT, "down.bias", torch.zeros(32)),
        [DRAFT, "unexpected tensor 'down.bias'", "up.weight, up.bias, down.weight"],
    ),
    "draft head of another base": (
        set_tensor(DRAFT, "up.weight", torch.zeros(6, 48)),
        [DRAFT, "tensor 'up.weight': expected shape [any, 32], found [6, 48]"],
    ),
    "draft head of no width": (
        set_tensor(DRAFT, "up.weight", torch.zeros(0, 32)),
        [DRAFT, "tensor 'up.weight': expected shape [any, 32], found [0, 32]"],
    ),
    "draft head with a bias for another width": (
        set_tensor(DRAFT, "up.bias", torch.zeros(7)),
        [DRAFT, "tensor 'up.bias': expected shape [6], found [7]"],
    ),
    "draft head the wrong way round": (
        set_tensor(DRAFT, "down.weight", torch.zeros(6, 32)),
        [DRAFT, "tensor 'down.weight': expected shape [32, 6], found [6, 32]"],
    ),
    "NaN in the draft head": (
        poison(DRAFT, "down.weight", NAN),
        [DRAFT, "tensor 'down.weight'", "found NaN"],
    ),
    "draft layer without a tensor": (
        set_tensor(LAYER, "mix.weight", None),
        [LAYER, "missing tensor 'mix.weight'"],
    ),
    "draft layer with another tensor": (
        set_tensor(LAYER, "mix.bias", torch.zeros(32)),
        [LAYER, "unexpected tensor 'mix.bias'", "a draft layer has mix.weight"],
    ),
    "draft layer of another base": (
        set_tensor(LAYER, "mix.weight", torch.zeros(48, 96)),
        [LAYER, "tensor 'mix.weight': expected shape [32, 64], found [48, 96]"],
    ),
    "draft layer that mixes states alone": (
        set_tensor(LAYER, "mix.weight", torch.zeros(32, 32)),
        [LAYER, "tensor 'mix.weight': expected shape [32, 64], found [32, 32]"],
    ),
    "draft layer whose queries do not fill heads": (
        set_tensor(LAYER, "query.weight", torch.zeros(24, 32)),
        [LAYER, "tensor 'query.weight': expected shape [a multiple of 16, 32], found [24, 32]"],
    ),
    "draft layer whose output is for other queries": (
        set_tensor(LAYER, "output.weight", torch.zeros(32, 16)),
        [LAYER, "tensor 'output.weight': expected shape [32, 32], found [32, 16]"],
    ),
    "draft layer without a depth's vector": (
        set_tensor(LAYER, "depths", torch.zeros(1, 32)),
        [LAYER, "tensor 'depths': expected shape [2, 32], found [1, 32]"],
    ),
    "draft layer of depth 1": (
        set_tensor(LAYER, "agreement", torch.ones(1)),
        [LAYER, "tensor 'agreement': expected a number for each of 2 to 17 depths, found [1]"],
    ),
    "draft layer that is too deep": (
        set_tensor(LAYER, "agreement", torch.ones(18)),
        [LAYER, "tensor 'agreement': expected a number for each of 2 to 17 depths, found [18]"],
    ),
    "draft layer that is right too often": (
        set_tensor(LAYER, "agreement", torch.tensor([0.9, 1.5, 0.8])),
        [LAYER, "tensor 'agreement': expected shares from 0 to 1, found [0.9, 1.5, 0.8]"],
    ),
    "draft layer of no width": (
        set_tensor(LAYER, "up.weight", torch.zeros(0, 32)),
        [LAYER, "tensor 'up.weight': expected shape [any, 32], found [0, 32]"],
    ),
    "draft layer with a bias for another width": (
        set_tensor(LAYER, "up.bias", torch.zeros(7)),
        [LAYER, "tensor 'up.bias': expected shape [16], found [7]"],
    ),
    "draft layer the wrong way round": (
        set_tensor(LAYER, "down.weight", torch.zeros(16, 32)),
        [LAYER, "tensor 'down.weight': expected shape [32, 16], found [16, 32]"],
    ),
    "NaN in the draft layer": (
        poison(LAYER, "depths", NAN),
        [LAYER, "tensor 'depths'", "found NaN"],
    ),
    "hash of a wrong type": (
        set_json(BUNDLE, sha256={BASE: "12"}),
        [f"sha256['{BASE}']: expected 64", "found '12'"],
    ),
    "hash of a missing file": (
        set_json(BUNDLE, sha256={"base/x.safetensors": "0" * 64}),
        ["sha256['base/x.safetensors']: expected a file there, found nothing"],
    ),
    "hash mismatch": (
        set_json(BUNDLE, sha256={EXPERT: "0" * 64}),
        [EXPERT, f"sha256: expected {'0' * 64}, found ", "restore it"],
    ),
    "hash mismatch of a tokenizer": (
        set_json(BUNDLE, sha256={"base/tokenizer.json": "0" * 64}),
        ["base/tokenizer.json", "sha256: expected 0000"],
    ),
    # paths
    "expert above": (
        expert(0, path="../x"),
        [BUNDLE, "expert 'alpha'", "outside the bundle", "allow outside paths"],
    ),
    "expert absolute": (
        expert(0, path="/etc"),
        ["expert 'alpha': '/etc' leads to '/etc', outside the bundle"],
    ),
    "base above": (set_json(BUNDLE, base="../base"), ["base: ", "outside the bundle"]),
    "base hub id": (
        set_json(BUNDLE, base="org/model-7b"),
        ["base: no folder 'org/model-7b' here", "not in the local cache", "--base"],
    ),
    "base missing": (
        set_json(BUNDLE, base="bsae"),
        ["base: expected a folder at", "found nothing"],
    ),
    "classifier is a file": (
        set_json(BUNDLE, classifier=BUNDLE),
        ["classifier: expected a folder", "found a file"],
    ),
    "classifier folder linked": (
        link_outside("classifier"),
        ["classifier: ", "outside the bundle"],
    ),
    "weights linked": (link_outside(EXPERT), [EXPERT, "outside the bundle"]),
    "config linked": (link_outside(ADAPTER), [ADAPTER, "outside the bundle"]),
    "base weights linked": (link_outside(BASE), [BASE, "outside the bundle"]),
    "hash outside": (
        set_json(BUNDLE, sha256={"../x": "0" * 64}),
        ["sha256['../x']", "outside the bundle"],
    ),
    "name too long": (expert(0, path="x" * 5000), ["xxx", "too long"]),
    # the base
    "no tokenizer.json": (
        remove("base/tokenizer.json"),
        ["base/tokenizer.json", "expected a file, found nothing", "save the base with a fast tokenizer"],
    ),
    "no base config": (
        remove("base/config.json"),
        ["base/config.json", "expected a file, found nothing"],
    ),
    "quantised base": (
        set_json("base/config.json", quantization_config={"bits": 4}),
        ["quantization_config"],
    ),
    "no base weights": (remove(BASE), [BASE, "expected a file, found nothing"]),
    "base is a pickle": (
        rename(BASE, "base/pytorch_model.bin"),
        [BASE, "expected safetensors, found pickle files 'pytorch_model.bin'", "convert"],
    ),
    "NaN in the base": (
        poison(BASE, "model.norm.weight", NAN),
        [BASE, "tensor 'model.norm.weight': expected finite values, found NaN"],
    ),
    "Inf in the base": (
        poison(BASE, "lm_head.weight", -INF),
        [BASE, "tensor 'lm_head.weight'", "found Inf"],
    ),
    "base in int8": (
        set_tensor(BASE, "model.x", torch.ones(2, dtype=torch.int8)),
        [BASE, "tensor 'model.x': expected dtype F32, F16, BF16, found I8"],
    ),
    # experts
    "no adapter config": (remove(ADAPTER), [ADAPTER, "expected a file, found nothing"]),
    "no adapter weights": (remove(EXPERT), [EXPERT, "expected a file, found nothing"]),
    "adapter is a pickle": (
        rename(EXPERT, "experts/alpha/adapter_model.bin"),
        [EXPERT, "pickle files 'adapter_model.b"],
    ),
    "not a LoRA": (
        set_json(ADAPTER, peft_type="IA3"),
        [ADAPTER, "peft_type: expected 'LORA', found 'IA3'"],
    ),
    "unknown LoRA field": (
        set_json(ADAPTER, use_doraa=True),
        ["unknown config key 'use_doraa'", "did you mean 'use_dora'"],
    ),
    "rank of a wrong type": (
        set_json(ADAPTER, r="4"),
        [ADAPTER, "r: expected an integer of at least 1, found '4'"],
    ),
    "rank 0 in a pattern": (
        set_json(ADAPTER, rank_pattern={"q": 0}),
        ["rank_pattern['q']: expected an integer", "found 0"],
    ),
    "alpha of a wrong type": (
        set_json(ADAPTER, lora_alpha=None),
        ["lora_alpha: expected a number, found None"],
    ),
    "pattern not an object": (
        set_json(ADAPTER, alpha_pattern=[1]),
        ["alpha_pattern: expected an object, found [1]"],
    ),
    "pattern not a regex": (
        set_json(ADAPTER, rank_pattern={"(": 4}),
        ["rank_pattern: '(' is not a regular expression"],
    ),
    "fan_in_fan_out of a wrong type": (
        set_json(ADAPTER, fan_in_fan_out=1),
        ["fan_in_fan_out: expected true or false, found 1"],
    ),
    "changed embedding": (
        set_tensor(EXPERT, "base_model.model.model.embed_tokens.base_layer.weight", torch.ones(320, 32)),
        ["tensor 'base_model.model.model.embed_tokens.base_layer.weight'", "copy of the base's [320, 32]", "trained"],
    ),
    "resized vocabulary": (
        set_tensor(EXPERT, "base_model.model.lm_head.weight", torch.ones(321, 32)),
        ["tensor 'base_model.model.lm_head.weight'", "copy of the base's [320, 32]", "of shape [321, 32]", "resized"],
    ),
    "half an embedding adapter": (
        set_tensor(EXPERT, "base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 320)),
        ["missing tensor 'base_model.model.model.embed_tokens.lora_embedding_B'"],
    ),
    "embedding of another vocabulary": (
        edit_tensors(EXPERT, embedding_adapter(300)),
        ["lora_embedding_A': expected shape [4, 320], found [4, 300]", "another base"],
    ),
    "rslora of a wrong type": (
        set_json(ADAPTER, use_rslora="no"),
        ["use_rslora: expected true or false, found 'no'"],
    ),
    "rank mismatch": (
        set_json(ADAPTER, rank_pattern={"layers.0.self_attn.q_proj": 7}),
        [EXPERT, f"tensor '{Q}A.weight': expected rank 7 from adapter_config.json, found 4"],
    ),
    "A of another base": (
        set_tensor(EXPERT, f"{Q}A.weight", torch.ones(4, 33)),
        [EXPERT, f"tensor '{Q}A.weight': expected shape [4, 32], found [4, 33]", "another base"],
    ),
    "B of another base": (
        set_tensor(EXPERT, f"{Q}B.weight", torch.ones(31, 4)),
        [EXPERT, f"tensor '{Q}B.weight': expected shape [32, 4], found [31, 4]"],
    ),
    "A of one dimension": (
        set_tensor(EXPERT, f"{Q}A.weight", torch.ones(4)),
        [EXPERT, f"tensor '{Q}A.weight': expected shape [4, 32], found [4]"],
    ),
    "missing B": (
        set_tensor(EXPERT, f"{Q}B.weight", None),
        [EXPERT, f"missing tensor '{Q}B.weight'"],
    ),
    "missing A": (
        set_tensor(EXPERT, f"{Q}A.weight", None),
        [EXPERT, f"missing tensor '{Q}A.weight'"],
    ),
    "missing module": (
        edit_tensors(EXPERT, drop_both),
        [EXPERT, "missing tensors for 'model.layers.0.self_attn.q_proj'", "target_modules ['q_proj', 'v_proj']"],
    ),
    "two adapters": (
        set_tensor(EXPERT, f"{Q}A.other.weight", torch.ones(4, 32)),
        [EXPERT, "expected one adapter, found several"],
    ),
    "empty adapter": (
        edit_tensors(EXPERT, dict.clear),
        [EXPERT, "expected tensors '...lora_A.weight'", "found none"],
    ),
    "foreign tensor": (
        set_tensor(EXPERT, "x\ny", torch.ones(1)),
        [EXPERT, "unexpected tensor 'x\\ny'", "expected names"],
    ),
    "NaN in an expert": (
        poison(EXPERT, f"{Q}B.weight", NAN),
        [EXPERT, f"tensor '{Q}B.weight'", "finite", "found NaN"],
    ),
    "Inf in an expert": (
        poison(EXPERT, f"{Q}A.weight", INF),
        [EXPERT, f"tensor '{Q}A.weight'", "finite", "found Inf"],
    ),
    "float64 expert": (
        set_tensor(EXPERT, f"{Q}A.weight", torch.ones(4, 32, dtype=torch.float64)),
        [EXPERT, f"tensor '{Q}A.weight': expected dtype F32, F16, BF16, found F64"],
    ),
    # sites
    "site without expert": (
        edit_json(BUNDLE, lambda d: d["sites"].append("model.layers.1.self_attn.k_proj")),
        [BUNDLE, "sites: no expert targets 'model.layers.1.self_attn.k_proj'"],
    ),
    "target not in sites": (
        edit_json(BUNDLE, lambda d: d["sites"].remove("model.layers.1.mlp.down_proj")),
        [BUNDLE, "sites: expected 'model.layers.1.mlp.down_proj', which expert 'beta' targets"],
    ),
    # the classifier
    "no classifier config": (remove(CONFIG), [CONFIG, "expected a file, found nothing"]),
    "unknown classifier key": (
        set_json(CONFIG, top_k=1),
        [CONFIG, "unknown config key 'top_k'", "did you mean 'top_k_lora'"],
    ),
    "temperature 0": (
        set_json(CONFIG, softmax_temperature=0),
        [CONFIG, "softmax_temperature: expected more than 0"],
    ),
    "top-k above E": (
        set_json(CONFIG, top_k_lora=4),
        [CONFIG, "top_k_lora: expected at most 3", "found 4"],
    ),
    "hidden size": (
        set_json(CONFIG, hidden_size=64),
        [CONFIG, "hidden_size: expected 32", "config.json", "found 64"],
    ),
    "no classifier": (remove(GATE), [GATE, "expected a file, found nothing"]),
    "classifier is a pickle": (
        rename(GATE, "classifier/xlora_classifier.pt"),
        [GATE, "pickle files 'xlora_classifier.pt'"],
    ),
    "missing last.weight": (
        set_tensor(GATE, "last.weight", None),
        [GATE, "missing tensor 'last.weight': expected shape [30, 24]"],
    ),
    "missing inner bias": (
        set_tensor(GATE, "inner.3.bias", None),
        [GATE, "missing tensor 'inner.3.bias': expected shape [24]", "use_bias is true"],
    ),
    "missing inner layer": (
        edit_tensors(GATE, lambda tensors: [tensors.pop("inner.3.weight"), tensors.pop("inner.3.bias")]),
        [GATE, "missing tensor 'inner.3.weight': xlora_depth 3 expects 2 inner layers, found 1"],
    ),
    "extra inner layer": (
        set_tensor(GATE, "inner.6.weight", torch.ones(24, 24)),
        [GATE, "unexpected tensor 'inner.6.weight': xlora_depth 3 expects 2 inner layers, found 3"],
    ),
    "extra tensor": (set_tensor(GATE, "scale", torch.ones(1)), [GATE, "unexpected tensor 'scale'"]),
    "PEFT's names": (
        set_tensor(GATE, "layers.0.weight", torch.ones(1)),
        [GATE, "unexpected", "'layers.0.weight'", "PEFT"],
    ),
    "inner width": (
        set_tensor(GATE, "inner.3.weight", torch.ones(24, 23)),
        [GATE, "tensor 'inner.3.weight': expected shape [24, 24], found [24, 23]"],
    ),
    "rows of another number of experts": (
        edit_tensors(GATE, lambda t: t.update({"last.weight": torch.ones(40, 24), "last.bias": torch.ones(30)})),
        [GATE, "tensor 'last.weight': expected shape [30, 24] (10 sites x 3 experts), found [40, 24]"],
    ),
    "bias of another length": (
        set_tensor(GATE, "last.bias", torch.ones(29)),
        [GATE, "tensor 'last.bias': expected shape [30] (10 sites x 3 experts), found [29]"],
    ),
    "NaN in the classifier": (
        poison(GATE, "last.bias", NAN),
        [GATE, "tensor 'last.bias': expected finite", "found NaN"],
    ),
    "Inf in the classifier": (
        poison(GATE, "inner.0.weight", INF),
        [GATE, "tensor 'inner.0.weight'", "found Inf"],
    ),
    # safetensors files
    "empty file": (write(GATE, b""), [GATE, "corrupt or truncated safetensors", "found 0 bytes"]),
    "not safetensors": (write(GATE, b"PK\x03\x04" + bytes(200)), [GATE, "corrupt"]),
    "header not json": (
        write(GATE, (8).to_bytes(8, "little") + b"xxxxxxxx"),
        [GATE, "the header is not readable"],
    ),
    "header a list": (
        write(GATE, (8).to_bytes(8, "little") + b"[      ]"),
        [GATE, "the header is not a JSON object"],
    ),
    "header entry": (
        write(GATE, header({"dtype": "F32"})),
        [GATE, "tensor 'x' has the header entry"],
    ),
    "header offsets": (
        write(GATE, header({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})),
        [GATE, "tensor 'x' of shape [3]: expected 12 bytes, found 8"],
    ),
    "header hole": (
        write(GATE, header({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]})),
        [GATE, "tensor 'x': expected to start at byte 0, found 4"],
    ),
    "trailing bytes": (
        write(GATE, header({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})),
        [GATE, "expected 4 bytes of data, found 8"],
    ),
    "truncated expert": (
        cut(EXPERT, 10),
        [EXPERT, "truncated: tensor 'base_model", "lies beyond the end: expected"],
    ),
    "truncated base": (cut(BASE, 4), [BASE, "truncated: tensor"]),
}


@pytest.mark.parametrize("case", CASES)
def test_defect(bundle: Path, case: str) -> None:
    damage, fragments = CASES[case]
    damage(bundle)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(bundle)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for fragment in fragments:
        assert fragment in message
    problems = [str(problem) for problem in find_problems(bundle)]
    assert problems == [message]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.x"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("lora_ga_config", {"a": 1}),
        ("use_qalora", True),
        ("use_bdlora", {"a": 1}),
        ("arrow_config", {"a": 1}),
        ("kasa_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_lora_variants_are_refused_by_name(bundle: Path, field: str, value: Any) -> None:
    set_json(ADAPTER, **{field: value})(bundle)
    with pytest.raises(CheckpointError, match=rf"{ADAPTER}: {field}: expected .*, found ") as caught:
        load_checkpoint(bundle)
    assert [str(problem) for problem in find_problems(bundle)] == [str(caught.value)]


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        (f"{Q}B.bias", "lora_bias"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
    ],
)
def test_tensors_of_lora_variants_are_refused_by_name(bundle: Path, tensor: str, what: str) -> None:
    set_tensor(EXPERT, tensor, torch.ones(4))(bundle)
    with pytest.raises(CheckpointError, match=f"tensor '{tensor}': {what} is not supported"):
        load_checkpoint(bundle)


def test_a_module_that_the_base_lacks_comes_with_close_names(bundle: Path) -> None:
    edit_tensors(EXPERT, move_q)(bundle)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(bundle)
    assert "the base has no module 'model.layers.0.self_attn.q_prj'" in str(caught.value)
    assert "did you mean 'model.layers.0.self_attn.q_proj'" in str(caught.value)


def test_all_independent_defects_are_found_at_once(bundle: Path) -> None:
    independent = {
        "hidden size": "xlora_config.json: hidden_size",
        "missing last.weight": "missing tensor 'last.weight'",
        "NaN in the base": "'model.norm.weight': expected finite",
        "A of another base": "expected shape [4, 32]",
        "no tokenizer.json": "tokenizer.json: expected a file",
        "unknown key": "unknown config key 'expert'",
    }
    for case in independent:
        CASES[case][0](bundle)
    set_json(ADAPTER.replace("alpha", "gamma"), use_dora=True)(bundle)
    text = "\n".join(str(problem) for problem in find_problems(bundle))
    for fragment in (*independent.values(), "gamma/adapter_config.json: use_dora"):
        assert fragment in text


def test_no_folder_and_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a bundle folder, found nothing"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="expected a bundle folder, found a file"):
        load_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("file", [BUNDLE, ADAPTER, EXPERT, CONFIG, GATE, "base/config.json", BASE, DRAFT, LAYER])
def test_random_damage_never_escapes_as_another_exception(bundle: Path, file: str) -> None:
    """Flipped bytes, cuts and insertions: the bundle loads or the error is ours, on one line."""
    generator = random.Random(file)
    original = (bundle / file).read_bytes()
    reach = min(len(original), 2000)  # headers come first
    for _ in range(40):
        content = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(reach)] = generator.choice([0, 34, 44, 48, 91, 93, 123, 125, 200, 255])
        if generator.random() < 0.3:
            del content[generator.randrange(len(content)) :]
        (bundle / file).write_bytes(content)
        assert all(len(str(problem).splitlines()) == 1 for problem in find_problems(bundle))


def test_summary(pristine: Path) -> None:
    text = describe(load_checkpoint(pristine))
    for fragment in (
        "X-LoRA bundle 'tiny'",
        "LlamaForCausalLM, 39,072 parameters, F32, hidden size 32",
        "rank 3-5, alpha 5-9, scale 1-3, 4 sites",
        "rank 2, alpha 6 rsLoRA, scale 4.24264",
        "S = 10",
        "[24, 32] -> [24, 24] -> [30, 24]",
        "softmax_temperature      1.0",
        "top_k_lora               null",
        "gate profile present",
        "draft head   6 wide, 390 parameters",
        "draft layer  depth 3, agreement .90 .75 .60, 16 wide",
        "7 files",
        "all match bundle.json",
    ):
        assert fragment in text


def test_summary_without_hashes(bundle: Path) -> None:
    assert "bundle.json has none to compare with" in describe(load_checkpoint(bundle))
