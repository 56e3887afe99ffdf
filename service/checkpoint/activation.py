"""Whether ReLU stands between the classifier's layers: what the tensors' names say, and what is stated.

Both libraries keep the layers in a list in which ReLU and Dropout count too, so the numbers of the Linears tell. One
inner layer has no neighbour to be counted from: there only a statement helps. A gate that is read the wrong way gives
scalings that look sound and are off by up to 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from service.checkpoint.defects import defect

FIELD = "enable_relu_and_dropout"
FLAG = "--gate-relu"
SHOWN = 6  # numbers of a message
RELU_AND_DROPOUT = "with ReLU and Dropout between the layers"
NOTHING = "with nothing between the layers"


def relu_of_original(numbers: Sequence[int], stated: bool | None, default: bool | None, file: Path) -> bool:
    """Of `inner.{k}`: Linear, ReLU, Dropout, so k goes by 3, or by 1 without the last two. `last` has no number.

    `default` is what an absent statement means where the names do not tell, None where it means nothing. Raises
    CheckpointError for names that neither way of counting gives, for a statement that contradicts them, and for one
    inner layer about which nothing is stated.
    """
    told = _told_by(numbers, {3: True, 1: False}, "inner", file)
    relu = told if stated is None else stated
    if told is not None and relu != told:
        raise _contradiction("inner", numbers, told, file)
    if relu is not None:
        return relu
    if default is None and numbers:
        problem = f"{FIELD}: expected in xlora_config.json, for one inner layer's name does not tell"
        hint = (
            f"say whether the gate was trained with ReLU: {FLAG} true, or false (the library's default until 2024-04)"
        )
        raise defect(file, problem, hint)
    return True if default is None else default


def relu_of_peft(numbers: Sequence[int], stated: bool | None, file: Path) -> bool:
    """Of PEFT's `layers.{k}`: Linear, ReLU, perhaps Dropout: k goes by 2 or by 3. There is always ReLU."""
    _told_by(numbers, {3: True, 2: True}, "layers", file)
    if stated is False and len(numbers) > 1:
        raise _contradiction("layers", numbers, True, file)
    return True


def _told_by(numbers: Sequence[int], strides: dict[int, bool], prefix: str, file: Path) -> bool | None:
    """What the distance of the numbers means; None for a single one."""
    distances = {after - before for before, after in itertools.pairwise(numbers)}
    allowed = set(strides)
    if numbers and (numbers[0] != 0 or len(distances) > 1 or not distances <= allowed):
        ways = " or ".join(f"{prefix}.0, {prefix}.{stride}, ..." for stride in sorted(allowed))
        raise defect(
            file, f"expected layers called {ways}, found {_listed(prefix, numbers)}", "is one of them missing?"
        )
    return strides[distances.pop()] if distances else None


def _contradiction(prefix: str, numbers: Sequence[int], told: bool, file: Path) -> Exception:
    problem = f"the layers {_listed(prefix, numbers)} are numbered {RELU_AND_DROPOUT if told else NOTHING}"
    hint = f"if the names are right, set it to {str(told).lower()}, or say {FLAG} {str(told).lower()}"
    return defect(file, f"{problem}, and {FIELD} is {str(not told).lower()}", hint)


def _listed(prefix: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{prefix}.{number}" for number in numbers[:SHOWN])
    return shown if len(numbers) <= SHOWN else f"{shown}, ..."
