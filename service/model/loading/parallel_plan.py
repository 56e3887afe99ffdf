"""The tensor-parallel plan of a base: transformers' own plan for the family, read and checked.

Knows the plan's styles, and the sizes that they need. Reads names and shapes (of the meta device, too), and splits
nothing; parallel.py does. Has no list of families: one without a plan in transformers is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from service.contract.errors import CheckpointError, SettingsError
from service.model.targets import is_plain_linear

COLUMN = {"colwise"}  # W split by outputs, which stay split
GATHERED = {"colwise_gather_output", "colwise_rep"}  # W split by outputs, which every rank gathers
ROW = {"rowwise"}  # W split by inputs, which arrive split; the ranks' outputs are summed
SPLITTING_ROW = {"rowwise_split_input", "rowwise_rep"}  # W split by inputs, which arrive whole; outputs are summed
VOCABULARY = {"embedding_rowwise"}  # an embedding split by tokens
LINEAR = COLUMN | GATHERED | ROW | SPLITTING_ROW
# Done by transformers' own forwards: a mixture's experts, and norms that are whole on every rank.
_PARAMETERS = {"packed_colwise", "rowwise"}
_LEFT_ALONE = {"moe_tp_experts", "replicated_with_grad_allreduce", "replicate"}


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this process, and the number of ranks of its group."""

    rank: int
    size: int

    def chunk(self, length: int) -> slice:
        """This rank's slice of a dimension, as torch.chunk divides it: the last slices may be shorter."""
        width = -(-length // self.size)
        start = min(self.rank * width, length)
        return slice(start, min(start + width, length))


def planned(model: Any) -> dict[str, str]:
    """The styles of the modules and parameters that the model's plan names."""
    rules: dict[str, str] = model.tp_plan or {}
    names = chain((name for name, _ in model.named_modules()), (name for name, _ in model.named_parameters()))
    return {name: rules[rule] for name in names if (rule := re.sub(r"\.\d+(?=\.|$)", ".*", name)) in rules}


def check_plan(skeleton: Any, size: int, base: Path) -> None:
    """Raises CheckpointError for a base that cannot be divided among ranks, SettingsError if not among `size`."""
    styles = planned(skeleton)
    modules = dict(skeleton.named_modules())
    decoder = {
        style
        for name, style in styles.items()
        if name.startswith(f"{skeleton.base_model_prefix}.") and style not in VOCABULARY
    }
    if not decoder:
        _refuse(base, f"transformers has no plan for the family {skeleton.config.model_type!r}")
    for name, style in styles.items():
        module = modules.get(name)
        known = _LEFT_ALONE | (LINEAR if is_plain_linear(module) else set()) if module is not None else _PARAMETERS
        known = known | (VOCABULARY if isinstance(module, nn.Embedding) else set())
        if style not in known:
            what = "a parameter" if module is None else type(module).__name__
            _refuse(base, f"the plan of the family {skeleton.config.model_type!r} has {name} ({what}) as {style!r}")
    for name, module in modules.items():
        if _is_attention(module):
            own = {styles.get(f"{name}.{child}") for child, part in module.named_children() if is_plain_linear(part)}
            if own & COLUMN and own - COLUMN - ROW:
                _refuse(
                    base, f"the plan of the family {skeleton.config.model_type!r} divides only some heads of {name}"
                )
    _check_sizes(list(_sizes(skeleton, styles)), size)


def splits_heads(skeleton: Any) -> bool:
    """Whether each rank computes attention for its own heads only, and so stores only their keys and values."""
    styles = planned(skeleton)
    return any(
        styles.get(f"{name}.{child}") in COLUMN
        for name, module in skeleton.named_modules()
        if _is_attention(module)
        for child, _ in module.named_children()
    )


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")


def _sizes(skeleton: Any, styles: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Names and sizes that the number of ranks must divide, the best known first."""
    config = skeleton.config.get_text_config()
    if splits_heads(skeleton):
        yield "attention heads", config.num_attention_heads
        yield "key/value heads", getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    modules, parameters = dict(skeleton.named_modules()), dict(skeleton.named_parameters())
    for name, style in styles.items():
        if name in parameters:
            shape = parameters[name].shape
            yield f"features of {name}", shape[-1] if style in ROW else shape[-2] // 2
        elif style in COLUMN:
            yield f"outputs of {name}", modules[name].out_features
        elif style in ROW | SPLITTING_ROW:
            yield f"inputs of {name}", modules[name].in_features


def _check_sizes(sizes: list[tuple[str, int]], ranks: int) -> None:
    common = math.gcd(*(size for _, size in sizes))
    allowed = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
    for what, size in sizes:
        if size % ranks:
            raise SettingsError(
                f"--tensor-parallel {ranks} does not divide the base model's {size} {what}",
                hint=f"this model allows {allowed}",
            )


def _refuse(base: Path, reason: str) -> NoReturn:
    raise CheckpointError(
        f"{base}/config.json: this base cannot be divided among processes: {reason}",
        hint="serve it without --tensor-parallel",
    )
