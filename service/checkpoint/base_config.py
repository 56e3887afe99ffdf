"""config.json of the base, as far as it can be judged without transformers: counts that the weights cannot fill, and
fields with which transformers would read something else than what is checked here.

Knows names of fields, whatever the family. What the fields mean together is for the model to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.checkpoint.defects import Defects, defect

DTYPES = ("float32", "bfloat16", "float16")
LAYER_COUNTS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
# Numbers of modules, which are built one by one; widths are not among them, and neither are positions.
MODULE_COUNT = re.compile(r"num_\w+|\w+_(layers|experts|heads)|n_(head|\w+_experts)")
MAX_LAYERS = 1000  # building one costs a millisecond or two; the deepest models have 130
MOST_MODULES = 4096  # of one kind, where the weights have neither so many tensors nor one so long
REFUSED_FIELDS = {
    "quantization_config": "use the model's float32, float16 or bfloat16 weights",
    "transformers_weights": "the weights are model.safetensors, or what its index names",
    "fusion_config": "it changes what the modules compute",
}
LAYER_NUMBER = re.compile(r"(.*?)\.(\d+)\.")


def stored_dtype(base: Path) -> str:
    """What config.json says that the base's weights are, as torch names it."""
    config = json.loads((base / "config.json").read_text())
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def check_base_config(
    config: Mapping[str, Any], source: Path, shapes: Mapping[str, tuple[int, ...]], defects: Defects
) -> None:
    """Reports what no weights of these `shapes` can fill, before anything is built that is as large as the numbers."""
    layers = min(_most_layers(shapes), MAX_LAYERS)
    longest = max((size for shape in shapes.values() for size in shape), default=0)
    modules = max(len(shapes), longest, MOST_MODULES)
    for name, value in _fields(config):
        field = name.rpartition(".")[2]
        if field in REFUSED_FIELDS and value:
            defects.add(defect(source, f"{name}: expected none, found {value!r:.80}", REFUSED_FIELDS[field]))
        elif field in ("dtype", "torch_dtype") and value not in (None, *DTYPES):
            defects.add(defect(source, f"{name}: expected {', '.join(DTYPES)}, found {value!r:.80}"))
        elif field.endswith(("_eps", "_epsilon")) and isinstance(value, int | float) and value < 0:
            defects.add(defect(source, f"{name}: expected at least 0, found {value!r:.80}"))
        elif isinstance(value, int | float) and MODULE_COUNT.fullmatch(field):
            most = layers if field in LAYER_COUNTS else modules
            if value > most:
                problem = f"{name}: expected at most {most}, which the weights can fill, found {value!r:.40}"
                defects.add(defect(source, problem))


def read_token_ids(value: Any, source: Path, vocabulary: int | None) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: an id, several, or none. Raises CheckpointError for what is no token's id."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id in ids:
        if type(id) is not int or id < 0 or (vocabulary is not None and id >= vocabulary):
            expected = "token ids" if vocabulary is None else f"token ids from 0 to {vocabulary - 1}"
            raise defect(source, f"eos_token_id: expected {expected}, found {id!r:.80}")
    return tuple(ids)


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every field at any depth, by its dotted name."""
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        prefix, section = pending.pop()
        for key, value in section.items():
            yield prefix + key, value
            if isinstance(value, dict):
                pending.append((f"{prefix}{key}.", value))


def _most_layers(names: Collection[str]) -> int:
    """The longest list of layers: different first numbers after the same beginning of a name."""
    numbers: dict[str, set[str]] = {}
    for name in names:
        if match := LAYER_NUMBER.match(name):
            numbers.setdefault(match[1], set()).add(match[2])
    return max(map(len, numbers.values()), default=0)
