"""XLoraConfig: the checkpoint's configuration, with PEFT's field names plus two of the original library's.

Knows the fields, their types and ranges. Does not know the numbers of experts and sites, so `top_k_lora <= E` and the
classifier's shapes are checked where those are known (bundle.py, classifier.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from service.checkpoint.defects import Defects, defect, did_you_mean

# Written by PEFT or the original library, without any influence on what is computed at inference.
IGNORED_FIELDS = frozenset(
    {
        "adapters",
        "auto_mapping",
        "base_model_id",
        "base_model_name_or_path",
        "device",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "stop_token_id",
        "task_type",
    }
)
MAX_FACTOR = 1e6  # of weights, and of the temperature or its inverse: float32 still holds what they multiply
NULLABLE_FIELDS = frozenset({"top_k_lora", "scaling_pass_value"})


@dataclass(frozen=True, slots=True)
class XLoraConfig:
    """The configuration of the gate (DESIGN section 2); the fields are those of PEFT's `XLoraConfig`."""

    hidden_size: int
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2  # training only
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = 1.0
    layerwise_scalings: bool = False
    top_k_lora: int | None = None
    scaling_pass_value: float | None = 0.0  # None means 1/E
    global_scaling_weight: float = 1.0
    enable_relu_and_dropout: bool = True  # the original library's; False means no ReLU between the layers
    use_bias: bool = True  # the original library's
    use_trainable_adapters: bool = False  # training only

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether a field is one of these, or one that is ignored."""
        return name in IGNORED_FIELDS or name in (field.name for field in fields(cls))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: Path | str) -> XLoraConfig:
        """Check every field's name, type and range. Raises CheckpointError naming `source` and the field."""
        kinds = {field.name: str(field.type) for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name in kinds:
                values[name] = _typed(name, value, kinds[name], source)
            elif name not in IGNORED_FIELDS:
                raise defect(source, f"unknown config key {name!r}", did_you_mean(name, kinds))
        if str(data.get("peft_type") or "XLORA").upper() != "XLORA":
            raise defect(source, f"peft_type: expected 'XLORA', found {data['peft_type']!r}")
        if "hidden_size" not in values:
            raise defect(source, "hidden_size is missing", "it is the hidden size of the base model")
        for name, value in values.items():
            _check_range(name, value, source)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return asdict(self)


def warn_of_unused(name: str, value: Any, source: Path, defects: Defects) -> bool:
    """Warns of an unknown field that is unset, as those that newer libraries add. Returns whether it is unset."""
    if not (value is None or value is False or value in ("", [], {})):
        return False
    defects.warn(source, f"unknown config key {name!r} is ignored: {value!r} asks for nothing")
    return True


def _typed(name: str, value: Any, kind: str, source: Path | str) -> Any:
    """`value` as the field's type; bool is not an int, an int is a float, a float is never an int."""
    if value is None and name in NULLABLE_FIELDS:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith("float") and is_number and abs(value) <= 1e300 and math.isfinite(value):
        return float(value)
    if kind.startswith("int") and is_number and isinstance(value, int):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    expected = {"float": "a finite number", "int": "an integer", "bool": "true or false"}[kind.split(" ")[0]]
    expected += " or null" if name in NULLABLE_FIELDS else ""
    raise defect(source, f"{name}: expected {expected}, found {value!r:.80}")


def _check_range(name: str, value: Any, source: Path | str) -> None:
    """Ranges of single fields."""
    at_least_one = name in {"hidden_size", "xlora_depth", "xlora_size", "top_k_lora"}
    if at_least_one and value is not None and value < 1:
        raise defect(source, f"{name}: expected at least 1, found {value}")
    if name == "softmax_temperature" and value <= 0:
        raise defect(source, f"{name}: expected more than 0, found {value}", "1.0 leaves the softmax as it is")
    if name == "softmax_temperature" and not 1 / MAX_FACTOR <= value <= MAX_FACTOR:
        raise defect(source, f"{name}: expected between {1 / MAX_FACTOR:g} and {MAX_FACTOR:g}, found {value}")
    if name in {"scaling_pass_value", "global_scaling_weight"} and abs(value or 0) > MAX_FACTOR:
        raise defect(source, f"{name}: expected between {-MAX_FACTOR:g} and {MAX_FACTOR:g}, found {value}")
    if name == "xlora_dropout_p" and not 0 <= value <= 1:
        raise defect(source, f"{name}: expected between 0 and 1, found {value}")
