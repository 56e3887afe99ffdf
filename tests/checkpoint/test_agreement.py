"""`check` accepts what `serve` loads, and nothing else; what it refuses is one line each that names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.checkpoint import load_checkpoint
from service.cli import main
from tests.support.agreement import check, serve
from tests.support.bundles import make_bundle
from tests.support.damage import Damage, edit_json, edit_tensors, link_outside, set_json, write

CONFIG, GENERATION = "base/config.json", "base/generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "base/tokenizer.json", "base/tokenizer_config.json"
TEMPLATE, WEIGHTS = "base/chat_template.jinja", "base/model.safetensors"
ADDITIONAL = "base/additional_chat_templates/default.jinja"
ADAPTER = "experts/alpha/adapter_config.json"
BOM = b"\xef\xbb\xbf"


def rope(**values: Any) -> Damage:
    return edit_json(CONFIG, lambda data: data["rope_parameters"].update(values))


def in_field(template: Any) -> Damage:
    """The chat template as a field of tokenizer_config.json."""

    def damage(bundle: Path) -> None:
        (bundle / TEMPLATE).unlink()
        set_json(TOKENIZER_CONFIG, chat_template=template)(bundle)

    return damage


REFUSED: dict[str, tuple[Damage, str, str]] = {
    "no heads": (set_json(CONFIG, num_attention_heads=0), CONFIG, "ZeroDivisionError"),
    "more heads": (set_json(CONFIG, num_attention_heads=8), WEIGHTS, "o_proj.weight': expected shape [32, 64]"),
    "heads that divide nothing": (set_json(CONFIG, num_key_value_heads=3), WEIGHTS, "expected shape [24, 32]"),
    "no KV heads": (set_json(CONFIG, num_key_value_heads=0), CONFIG, "ZeroDivisionError"),
    "dtype": (set_json(CONFIG, dtype="evil"), CONFIG, "dtype: expected float32, bfloat16, float16, found 'evil'"),
    "old dtype": (set_json(CONFIG, torch_dtype="evil"), CONFIG, "torch_dtype: expected float32"),
    "dtype of a list": (set_json(CONFIG, dtype=["float32"]), CONFIG, "dtype: expected float32"),
    "eps of text": (set_json(CONFIG, rms_norm_eps="nan"), CONFIG, "rms_norm_eps"),
    "eps below 0": (set_json(CONFIG, rms_norm_eps=-1.0), CONFIG, "rms_norm_eps: expected at least 0, found -1.0"),
    "a number beyond floats": (write(CONFIG, b'{"rms_norm_eps": 1e999}'), CONFIG, "1e999 is beyond the range"),
    "vocabulary of 10^12": (set_json(CONFIG, vocab_size=10**12), WEIGHTS, "expected shape [1000000000000, 32]"),
    "vocabulary of 10^30": (set_json(CONFIG, vocab_size=10**30), CONFIG, "knows no causal language model"),
    "vocabulary of one more": (set_json(CONFIG, vocab_size=321), WEIGHTS, "expected shape [321, 32]"),
    "layers of 10^9": (set_json(CONFIG, num_hidden_layers=10**9), CONFIG, "num_hidden_layers: expected at most 2"),
    "layers of one more": (set_json(CONFIG, num_hidden_layers=3), CONFIG, "expected at most 2"),
    "layers of text": (set_json(CONFIG, num_hidden_layers="2"), CONFIG, "num_hidden_layers"),
    "layers of 1e9": (set_json(CONFIG, num_hidden_layers=1e9), CONFIG, "num_hidden_layers: expected at most 2"),
    "layers, nested": (set_json(CONFIG, text_config={"num_layers": 10**9}), CONFIG, "text_config.num_layers"),
    "modules of 10^9": (set_json(CONFIG, num_local_experts=10**9), CONFIG, "num_local_experts: expected at most"),
    "hidden size null": (set_json(CONFIG, hidden_size=None), CONFIG, "hidden_size"),
    "intermediate size": (set_json(CONFIG, intermediate_size=65), WEIGHTS, "expected shape [32, 65]"),
    "intermediate size true": (set_json(CONFIG, intermediate_size=True), CONFIG, "intermediate_size"),
    "head of 10^9": (set_json(CONFIG, head_dim=10**9), WEIGHTS, "expected shape [2000000000, 32]"),
    "head below 0": (set_json(CONFIG, head_dim=-8), CONFIG, "knows no causal language model"),
    "context of none": (set_json(CONFIG, max_position_embeddings=0), CONFIG, "whole number from 2 to"),
    "context of 10^12": (set_json(CONFIG, max_position_embeddings=10**12), CONFIG, "whole number from 2 to"),
    "context of text": (set_json(CONFIG, max_position_embeddings="8192"), CONFIG, "max_position_embeddings"),
    "rope type": (rope(rope_type="evil"), CONFIG, "knows no causal language model"),
    "rope theta 0": (rope(rope_theta=0.0), CONFIG, "rope_parameters: expected ones with finite frequencies"),
    "rope theta below 0": (rope(rope_theta=-1e4), CONFIG, "rope_parameters: expected ones with finite frequencies"),
    "rope theta of text": (rope(rope_theta="x"), CONFIG, "knows no causal language model"),
    "rope of a list": (set_json(CONFIG, rope_parameters=[1]), CONFIG, "knows no causal language model"),
    "activation": (set_json(CONFIG, hidden_act="evil"), CONFIG, "KeyError"),
    "tied by text": (set_json(CONFIG, tie_word_embeddings="yes"), CONFIG, "tie_word_embeddings"),
    "padding outside": (set_json(CONFIG, pad_token_id=10**6), CONFIG, "knows no causal language model"),
    "biases that are not there": (set_json(CONFIG, attention_bias=True), WEIGHTS, "k_proj.bias'"),
    "a tensor of another name": (
        edit_tensors(WEIGHTS, lambda tensors: tensors.update(norm=tensors.pop("model.norm.weight"))),
        WEIGHTS,
        "missing tensors 'model.norm.weight', which config.json expects",
    ),
    "model type": (set_json(CONFIG, model_type="evil"), CONFIG, "knows no causal language model"),
    "no causal LM": (set_json(CONFIG, model_type="vit"), CONFIG, "knows no causal language model"),
    "other weights": (set_json(CONFIG, transformers_weights="x.safetensors"), CONFIG, "transformers_weights: expected"),
    "fusions": (set_json(CONFIG, fusion_config={"x": True}), CONFIG, "fusion_config: expected none"),
    "nested quantisation": (set_json(CONFIG, text_config={"quantization_config": {"a": 1}}), CONFIG, "expected none"),
    "config a list": (write(CONFIG, b"[]"), CONFIG, "expected a JSON object"),
    "config with BOM": (write(CONFIG, BOM + b"{}"), CONFIG, "found a byte order mark"),
    "a description that is no text": (
        edit_json("bundle.json", lambda data: data["experts"][0].update(description="\ud800")),
        "bundle.json",
        "experts[0].description: expected a string",
    ),
    "a profile of numbers without end": (
        set_json("bundle.json", gate_profile={"a": [10**30]}),
        "bundle.json",
        "gate_profile: expected an object of text and numbers",
    ),
    "an adapter in the base": (write("base/adapter_config.json", b"{}"), "base/adapter_config.json", "expected none"),
    "a distributed save in the base": (
        write("base/shard-00001-model-00001-of-00001.safetensors", b""),
        "base/shard-00001-model",
        "transformers would load it",
    ),
    "eos of text": (set_json(CONFIG, eos_token_id="1"), CONFIG, "eos_token_id: expected token ids from 0 to 319"),
    "generation eos of text": (set_json(GENERATION, eos_token_id="1"), GENERATION, "ids from 0 to 319, found '1'"),
    "generation eos a float": (set_json(GENERATION, eos_token_id=1.0), GENERATION, "ids from 0 to 319, found 1.0"),
    "generation eos true": (set_json(GENERATION, eos_token_id=True), GENERATION, "ids from 0 to 319, found True"),
    "generation eos in a list": (set_json(GENERATION, eos_token_id=[1, "2"]), GENERATION, "found '2'"),
    "generation eos an object": (set_json(GENERATION, eos_token_id={"a": 1}), GENERATION, "found {'a': 1}"),
    "generation config empty": (write(GENERATION, b""), GENERATION, "broken JSON"),
    "generation config broken": (write(GENERATION, b"{"), GENERATION, "broken JSON"),
    "generation config with BOM": (write(GENERATION, BOM + b"{}"), GENERATION, "found a byte order mark"),
    "generation config a list": (write(GENERATION, b"[1]"), GENERATION, "expected a JSON object"),
    "tokenizer empty": (write(TOKENIZER, b"{}"), TOKENIZER, "no tokenizer"),
    "tokenizer a list": (write(TOKENIZER, b"[]"), TOKENIZER, "expected a JSON object"),
    "tokenizer broken": (write(TOKENIZER, b'{"model": '), TOKENIZER, "broken JSON"),
    "tokenizer with BOM": (write(TOKENIZER, BOM + b"{}"), TOKENIZER, "found a byte order mark"),
    "tokenizer's model": (set_json(TOKENIZER, model={"type": "evil"}), TOKENIZER, "no tokenizer"),
    "an unknown token that is unknown": (
        edit_json(TOKENIZER, lambda data: [data["model"].update(unk_token="<evil>"), data.update(pre_tokenizer=None)]),
        TOKENIZER,
        "no tokenizer: Exception: Unk token `<evil>` not found in the vocabulary",
    ),
    "a template for chats no Jinja": (
        lambda bundle: [
            (bundle / ADDITIONAL).parent.mkdir(),
            (bundle / ADDITIONAL).write_text("{% for %}"),
        ],
        ADDITIONAL,
        "no chat template: TemplateSyntaxError",
    ),
    "tokenizer config a list": (write(TOKENIZER_CONFIG, b"[]"), TOKENIZER_CONFIG, "expected a JSON object"),
    "tokenizer config empty": (write(TOKENIZER_CONFIG, b""), TOKENIZER_CONFIG, "broken JSON"),
    "tokenizer config with BOM": (write(TOKENIZER_CONFIG, BOM + b"{}"), TOKENIZER_CONFIG, "found a byte order mark"),
    "template no Jinja": (write(TEMPLATE, b"{% for %}"), TEMPLATE, "no chat template: TemplateSyntaxError"),
    "template of an unknown filter": (write(TEMPLATE, b"{{ x|evil }}"), TEMPLATE, "no chat template"),
    "template too deep": (write(TEMPLATE, b"{% if x %}" * 999 + b"{% endif %}" * 999), TEMPLATE, "no chat template"),
    "template too long": (write(TEMPLATE, b"a" * 100_001), TEMPLATE, "expected at most 100,000 characters"),
    "template in Latin-1": (write(TEMPLATE, "é".encode("latin-1")), TEMPLATE, "not readable as UTF-8"),
    "template with BOM": (write(TEMPLATE, BOM + b"x"), TEMPLATE, "found a byte order mark"),
    "template field no Jinja": (in_field("{% for %}"), TOKENIZER_CONFIG, "no chat template: TemplateSyntaxError"),
    "template field a number": (in_field(3), TOKENIZER_CONFIG, "chat_template: expected a text, found 3"),
    "template field without names": (in_field([{"template": "x"}]), TOKENIZER_CONFIG, "no chat template"),
}


ACCEPTED: dict[str, Damage] = {
    "no template": lambda bundle: (bundle / TEMPLATE).unlink(),
    "no tokenizer config": lambda bundle: (bundle / TOKENIZER_CONFIG).unlink(),
    "no generation config": lambda bundle: (bundle / GENERATION).unlink(),
    "eos in config.json only": edit_json(GENERATION, lambda data: data.pop("eos_token_id")),
    "eos outside": set_json(CONFIG, eos_token_id=320),
    "generation eos below 0": set_json(GENERATION, eos_token_id=-1),
    "generation eos outside": set_json(GENERATION, eos_token_id=[1, 320]),
    "generation eos of none": set_json(GENERATION, eos_token_id=[]),
    "several eos": set_json(GENERATION, eos_token_id=[1, 2]),
    "no eos": lambda bundle: [set_json(file, eos_token_id=None)(bundle) for file in (CONFIG, GENERATION)],
    "a generation config that nobody reads": set_json(GENERATION, temperature="hot", cache_implementation="evil"),
    "a constant that is never ready": write(TEMPLATE, b"{% if false %}{{ 9**9**9 }}{% endif %}"),
    "templates of which none is for chats": lambda bundle: [
        (bundle / TEMPLATE).rename(bundle / "base/tool_use"),
        (bundle / "base/additional_chat_templates").mkdir(),
        (bundle / "base/tool_use").rename(bundle / "base/additional_chat_templates/tool_use.jinja"),
    ],
    "named templates": in_field([{"name": "default", "template": "x"}, {"name": "tool", "template": "y"}]),
    "an attention of the hub": set_json(CONFIG, attn_implementation="evil/kernels", _attn_implementation="evil/x"),
    "odd architectures": set_json(CONFIG, architectures=["Evil"]),
    "a profile that nothing can use": set_json("bundle.json", gate_profile={"phases": {"prompt": [1]}}),
    "an older field": set_json(CONFIG, torch_dtype="float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_both(bundle: Path, case: str) -> None:
    damage, file, fragment = REFUSED[case]
    damage(bundle)
    lines = check(bundle)
    assert len(lines) == 1
    assert len(lines[0].splitlines()) == 1
    assert lines[0].startswith(str(bundle / file))
    assert fragment in lines[0]
    assert serve(bundle) == lines[0]


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_by_both(bundle: Path, case: str) -> None:
    ACCEPTED[case](bundle)
    assert (check(bundle), serve(bundle)) == ([], None)


@pytest.mark.parametrize("case", ["no heads", "template no Jinja", "layers of 10^9", "generation eos of text"])
def test_the_command_prints_one_line(bundle: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    REFUSED[case][0](bundle)
    assert main(["check", str(bundle)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {bundle / REFUSED[case][1]}: ")
    assert all(line.startswith("hint: ") for line in lines[1:])


def test_everything_is_listed_at_once(bundle: Path) -> None:
    """What only transformers knows of the base stands beside what else is wrong."""
    set_json(CONFIG, hidden_act="evil")(bundle)
    set_json("bundle.json", expert=[])(bundle)
    set_json(ADAPTER, r="4")(bundle)
    text = "\n".join(check(bundle))
    for fragment in ("knows no causal language model", "unknown config key 'expert'", "r: expected an integer"):
        assert fragment in text


BASE_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "vocab.json"),
    *("merges.txt", "model.safetensors.index.json", "anything.else"),
)


@pytest.mark.parametrize("name", BASE_FILES)
def test_no_file_of_the_base_is_a_link_out_of_the_bundle(bundle: Path, name: str) -> None:
    if not (bundle / "base" / name).exists():
        (bundle / "base" / name).write_text("{}")
    link_outside(f"base/{name}")(bundle)
    lines = check(bundle)
    assert lines
    assert all(f"base/{name}: path: " in line and "outside the bundle" in line for line in lines)
    assert "outside the bundle" in str(serve(bundle))
    assert load_checkpoint(bundle, allow_outside=True).name == "tiny"


def test_links_inside_the_bundle_are_followed(bundle: Path) -> None:
    (bundle / TEMPLATE).rename(bundle / "template")
    (bundle / TEMPLATE).symlink_to("../template")
    assert (check(bundle), serve(bundle)) == ([], None)


def test_a_mixture_s_experts_are_matched_as_transformers_merges_them(tmp_path: Path) -> None:
    """Files have a tensor for each expert, the model one for all."""
    config = {"num_local_experts": 4, "num_experts_per_tok": 2}
    bundle = make_bundle(tmp_path / "m", architecture="mixtral", experts=["x"], targets=["q_proj"], base_config=config)
    edit_json("bundle.json", lambda data: data.pop("sha256"))(bundle)
    assert check(bundle) == []
    set_json(CONFIG, num_local_experts=5)(bundle)
    assert "base/model.safetensors: " in check(bundle)[0]


HOSTILE: list[Any] = [
    *(None, True, False, "", "x", "1", -1, 0, 1, 3, 1.0, 1.5, 10**9, 10**12, 10**30, 10**400, -1e308, 1e308),
    *([], [1], ["x"], {}, {"a": 1}),
]
FILES = [CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, ADAPTER, "classifier/xlora_config.json", "bundle.json"]
MACHINE = "of KV memory"  # serving wants more memory than there is: not the bundle's fault


def mutations(bundle: Path, file: str) -> Iterator[dict[str, Any]]:
    """The file with each key at two depths taken out, and with each hostile value in its place."""
    text = (bundle / file).read_text()
    data = json.loads(text)
    places = [[key] for key in data]
    places += [[key, inner] for key, value in data.items() if isinstance(value, dict) for inner in list(value)[:20]]
    for *outer, last in places:
        for value in [*HOSTILE, mutations]:  # the last one: no value at all
            changed = json.loads(text)
            section = changed[outer[0]] if outer else changed
            section[last] = value
            if value is mutations:
                del section[last]
            yield changed


def assert_agreement(pristine: Path, folder: Path, file: str, changed: list[dict[str, Any]]) -> None:
    for data in changed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        (folder / file).write_text(json.dumps(data))
        lines, reason = check(folder), serve(folder)
        assert all(len(line.splitlines()) == 1 and str(folder) in line for line in lines), data
        if MACHINE not in str(reason):
            assert bool(lines) == bool(reason), (data, lines, reason)


@pytest.mark.parametrize("file", FILES)
def test_hostile_values(pristine: Path, tmp_path: Path, file: str) -> None:
    """A seeded sample; all of them in the slow test."""
    sample = random.Random(file).sample(list(mutations(pristine, file)), 5)
    assert_agreement(pristine, tmp_path / "tiny", file, sample)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("file", FILES)
def test_all_hostile_values(pristine: Path, tmp_path: Path, file: str, part: int) -> None:
    assert_agreement(pristine, tmp_path / "tiny", file, list(mutations(pristine, file))[part::8])
