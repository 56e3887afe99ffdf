"""XLoraConfig: names, types and ranges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import peft
import pytest

from service.checkpoint import XLoraConfig
from service.checkpoint.config import IGNORED_FIELDS
from service.contract.errors import CheckpointError

SOURCE = Path("somewhere/xlora_config.json")


def test_every_field_of_pefts_config_is_known_with_pefts_default() -> None:
    """A field PEFT adds must be decided on, not ignored by accident."""
    ours = {field.name: field.default for field in dataclasses.fields(XLoraConfig)}
    for field in dataclasses.fields(peft.XLoraConfig):
        assert field.name in ours or field.name in IGNORED_FIELDS
        if field.name in ours and field.name != "hidden_size":
            assert ours[field.name] == field.default, field.name


def test_round_trip_through_json() -> None:
    config = XLoraConfig(hidden_size=64, xlora_depth=2, top_k_lora=3, scaling_pass_value=None, softmax_temperature=0.5)
    assert XLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())), SOURCE) == config


def test_pefts_own_json_is_accepted(tmp_path: Path) -> None:
    peft.XLoraConfig(hidden_size=32, adapters={"a": "x"}, task_type="CAUSAL_LM", top_k_lora=1).save_pretrained(tmp_path)
    config = XLoraConfig.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()), SOURCE)
    assert config == XLoraConfig(hidden_size=32, top_k_lora=1)


def test_integers_are_numbers_and_null_scaling_pass_value_survives() -> None:
    config = XLoraConfig.from_dict({"hidden_size": 8, "softmax_temperature": 2, "scaling_pass_value": None}, SOURCE)
    assert config.softmax_temperature == 2.0
    assert isinstance(config.softmax_temperature, float)
    assert config.scaling_pass_value is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"softmax_temprature": 1.0},
            "unknown config key 'softmax_temprature' (hint: did you mean 'softmax_temperature'",
        ),
        ({"zzz": 1}, "unknown config key 'zzz'"),
        ({"hidden_size": None}, "hidden_size: expected an integer, found None"),
        ({"hidden_size": 32.0}, "hidden_size: expected an integer, found 32.0"),
        ({"hidden_size": True}, "hidden_size: expected an integer, found True"),
        ({"enable_softmax": 1}, "enable_softmax: expected true or false, found 1"),
        ({"enable_softmax": "yes"}, "enable_softmax: expected true or false, found 'yes'"),
        ({"softmax_temperature": "1"}, "softmax_temperature: expected a finite number, found '1'"),
        ({"softmax_temperature": None}, "softmax_temperature: expected a finite number, found None"),
        ({"softmax_temperature": 0}, "softmax_temperature: expected more than 0, found 0.0"),
        ({"softmax_temperature": -1.0}, "softmax_temperature: expected more than 0, found -1.0"),
        ({"global_scaling_weight": float("nan")}, "global_scaling_weight: expected a finite number, found nan"),
        ({"global_scaling_weight": float("inf")}, "global_scaling_weight: expected a finite number, found inf"),
        ({"global_scaling_weight": 10**400}, "global_scaling_weight: expected a finite number, found 1000"),
        ({"scaling_pass_value": "0"}, "scaling_pass_value: expected a finite number or null, found '0'"),
        ({"global_scaling_weight": -1e300}, "global_scaling_weight: expected between -1e+06 and 1e+06, found -1e+300"),
        ({"scaling_pass_value": 1e7}, "scaling_pass_value: expected between -1e+06 and 1e+06, found 10000000.0"),
        ({"softmax_temperature": 1e-300}, "softmax_temperature: expected between 1e-06 and 1e+06, found 1e-300"),
        ({"top_k_lora": 0}, "top_k_lora: expected at least 1, found 0"),
        ({"top_k_lora": 1.5}, "top_k_lora: expected an integer or null, found 1.5"),
        ({"xlora_depth": 0}, "xlora_depth: expected at least 1, found 0"),
        ({"xlora_size": -1}, "xlora_size: expected at least 1, found -1"),
        ({"xlora_dropout_p": 1.5}, "xlora_dropout_p: expected between 0 and 1, found 1.5"),
        ({"peft_type": "LORA"}, "peft_type: expected 'XLORA', found 'LORA'"),
    ],
)
def test_refusals(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        XLoraConfig.from_dict({"hidden_size": 32, **changes}, SOURCE)
    assert str(caught.value).startswith(f"{SOURCE}: {expected}")


def test_hidden_size_is_required() -> None:
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        XLoraConfig.from_dict({}, SOURCE)
