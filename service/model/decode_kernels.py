"""The operators of decode_kernels.cpp: what they compute, how they are built, how a compiled step comes to call them.

    decode_linear       y = W x + b, and from row `first_row` on + B ((A x) * g)
    decode_attention    one query row per stream over the keys and values of its blocks, read where they lie

AOTInductor emits direct calls of C functions, so nothing of torch is between a compiled step and these. They exist in
compiled steps only: the operators can be traced, not run. Eager steps have linear.py and attention.py.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache

DTYPES = (torch.float32, torch.bfloat16)

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fopenmp")
_EXACT = (torch.Tag.needs_exact_strides,)  # dense tensors stay dense
_HANDLE, _OPTIONAL = "AtenTensorHandle", "AtenTensorHandle*"
_LINEAR = (*[_HANDLE] * 2, *[_OPTIONAL] * 4, "int64_t")
_ATTENTION = (*[_HANDLE] * 5, "double", "int64_t", "double")

_new_library: Any = torch.library.Library  # has no types
_library = _new_library("xlora", "DEF")
_library.define(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b_t, Tensor? gate, SymInt first_row)"
    " -> Tensor",
    tags=_EXACT,
)
_library.define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor block_table, Tensor positions, float scaling,"
    " int window, float softcap) -> Tensor",
    tags=_EXACT,
)


def _fake_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_attention(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


torch.library.register_fake("xlora::decode_linear", _fake_linear, lib=_library)
torch.library.register_fake("xlora::decode_attention", _fake_attention, lib=_library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear."""
    return adapted_linear(x, weight, bias, None, None, None, 0)


def adapted_linear(
    x: Tensor,  # [..., T, in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    a: Tensor | None,  # [R, in]
    b_t: Tensor | None,  # [R, out]
    gate: Tensor | None,  # [T - first_row, R]
    first_row: int,
) -> Tensor:
    """XLoraLinear's forward as one call."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.xlora.decode_linear(rows, weight, bias, a, b_t, gate, first_row)
    return y.view(*x.shape[:-1], weight.shape[0])


def attend(
    rows: Tensor,  # [N, heads, head_dim]
    group: AttentionGroup,
    layer: int,
    kv_cache: KVCache,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a group of one-row segments (attention.py's Backend)."""
    keys, values = kv_cache.keys[layer], kv_cache.values[layer]
    table, positions = group.block_table, group.positions[:, 0]
    attended: Tensor = torch.ops.xlora.decode_attention(
        rows.contiguous(), keys, values, table, positions, scaling, window or 0, softcap or 0.0
    )
    return attended


class PlainLinears(TorchFunctionMode):
    """What is traced under it multiplies with these kernels where it says F.linear: head, classifier and the like."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[0].dtype in DTYPES:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def inductor_configs() -> dict[str, Any]:
    """What makes AOTInductor call the C functions directly."""
    shims = {"decode_linear": _LINEAR, "decode_attention": _ATTENTION}
    return {
        "aot_inductor.custom_ops_to_c_shims": {
            getattr(torch.ops.xlora, name).default: [
                f"AOTITorchError aoti_torch_cpu_{name}({', '.join([*arguments, _OPTIONAL])})"
            ]
            for name, arguments in shims.items()
        }
    }


def build(library: Path, threads: int) -> None:
    """Compiles for this CPU, in seconds. Raises RuntimeError with what the compiler said."""
    torch_folder = Path(torch.__file__).parent
    command = [
        *(get_cpp_compiler(), *_FLAGS, f"-DXLORA_THREADS={threads}", str(_SOURCE), "-o", str(library)),
        *(f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{_SOURCE.name} could not be compiled: {done.stderr.strip()}")


def load(library: Path) -> None:
    """Makes the functions known to the compiled steps that are loaded after it. Raises OSError."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
