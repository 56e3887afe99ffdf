"""One linear of the published shape, one thread: the native kernel by rows and experts, and packed weights by library.

python -m benchmarks.linear [--outputs 14336] [--inputs 4096] [--repeats 12]

native   float32 over weights in bfloat16, eight of them in turns so that they come from memory; without experts,
         and with 144 ranks of experts in float32 on every row. Milliseconds, the least of all repeats
packed   bfloat16: the plain linear, torch's operators for int8 and int4, and bitsandbytes; torchao's int8 where it
         is installed. `error` is that of the product over the plain one's, for random weights
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import emit, print_row, use_threads
from service.contract.options import EngineOptions
from service.model.loading.quantised import PackedLinear, QuantisedLinear
from service.native import library, operators

_WEIGHTS, _RANKS = 8, 144


def least_ms(compute: Callable[[], Any], repeats: int) -> float:
    """The shortest of some runs, after one that warms up."""
    compute()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds)


def native(outputs: int, inputs: int, repeats: int) -> list[dict[str, Any]]:
    """A row per number of rows."""
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(_WEIGHTS)]
    a = [torch.randn(_RANKS, inputs) / 64 for _ in range(_WEIGHTS)]
    b_t = [torch.randn(_RANKS, outputs) / 64 for _ in range(_WEIGHTS)]
    rows = []
    for count in (1, 2, 4, 8):
        x, gate = torch.randn(count, inputs), torch.ones(count, _RANKS)

        def plain(x: Tensor = x) -> None:
            for weight in weights:
                operators.linear(x, weight, None)

        def adapted(x: Tensor = x, gate: Tensor = gate) -> None:
            for weight, down, up in zip(weights, a, b_t, strict=True):
                operators.linear(x, weight, None, down, up, gate)

        row = {"rows": count, "plain_ms": least_ms(plain, repeats) / _WEIGHTS}
        row["experts_ms"] = least_ms(adapted, repeats) / _WEIGHTS
        row["gigabytes_per_second"] = weights[0].nbytes / row["plain_ms"] / 1e6
        print_row(row)
        rows.append(row)
    return rows


@torch.inference_mode()
def packed(outputs: int, inputs: int, repeats: int) -> list[dict[str, Any]]:
    """A row per library and width."""
    linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    sides: dict[str, nn.Module] = {"plain": linear}
    sides |= {f"torch {kind}": PackedLinear(linear, kind) for kind in ("int8", "int4")}  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    if find_spec("bitsandbytes") is not None:
        sides |= {f"bitsandbytes {kind}": QuantisedLinear(linear, kind, cpu) for kind in ("int8", "int4")}  # type: ignore[arg-type]
    if find_spec("torchao") is not None:
        sides["torchao int8"] = _torchao(linear)
    x = torch.randn(16, inputs).bfloat16()
    expected = linear(x).float()
    rows = []
    for name, side in sides.items():
        row: dict[str, Any] = {"library": name, "error": float((side(x).float() - expected).norm() / expected.norm())}
        for count in (1, 2, 16, 256):
            own = torch.randn(count, inputs).bfloat16()
            row[f"{count}_rows_ms"] = least_ms(lambda own=own, side=side: side(own), max(1, repeats // 4))  # type: ignore[misc]
        print_row(row)
        rows.append(row)
    return rows


def _torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # no dependency of ours

    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
    copy.weight.data.copy_(linear.weight)
    quantize_(copy, Int8WeightOnlyConfig())
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=14336)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    library.provide(Path(EngineOptions("").native_cache).expanduser())
    use_threads(1)
    sizes = args.outputs, args.inputs, args.repeats
    emit({"benchmark": "linear", "native": native(*sizes), "packed": packed(*sizes)})


if __name__ == "__main__":
    main()
