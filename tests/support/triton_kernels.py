"""Compiles Triton kernels for GPUs that are not here, through the functions that launch them.

Needs triton, whose wheel brings ptxas; no GPU. Kernels are found in the source, not in a list that could go stale.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from service.model.attention import triton as paged_triton
from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache, KVLayout

ROOT = Path(__file__).parents[2]
CHIPS = (80, 90, 100)  # compute capabilities to compile for
# Most shared memory of a block in bytes by compute capability (CUDA C++ Programming Guide 13, "Compute Capabilities",
# the sections "Shared Memory" of each). A kernel must fit the smallest: there is one tiling for all.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled for one chip."""

    kernel: str
    shared_bytes: int
    hash: str  # of source and specialisation: another one is another compilation


@functools.cache
def kernels(root: Path = ROOT) -> set[tuple[str, str]]:
    """Module and name of every function under `root`/service that is decorated with triton.jit."""
    found = set()
    for path in (root / "service").rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if "triton.jit" in text else ():
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found.add((module, node.name))
    return found


@contextmanager
def replaced_launches(launch: Callable[[JITFunction[Any], Any, Any, Any], None]) -> Iterator[None]:
    """launch(kernel, grid, arguments, keywords) in place of every launch of a kernel of the service."""
    with ExitStack() as exits:
        for module_name, name in kernels():
            module = importlib.import_module(module_name)
            exits.enter_context(patch.object(module, name, _Launches(getattr(module, name), launch)))
        yield


class _Launches:
    def __init__(self, kernel: JITFunction[Any], launch: Callable[[JITFunction[Any], Any, Any, Any], None]) -> None:
        self._kernel, self._launch = kernel, launch

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launch(self._kernel, grid, args, kwargs)


@contextmanager
def compiling_for(chip: int) -> Iterator[list[Compiled]]:
    """Launches inside compile the kernel as Triton would on such a chip, and run nothing."""
    target = GPUTarget("cuda", chip, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: chip,  # kernels are kept per device
        get_current_stream=lambda _: 0,
    )
    compiled: list[Compiled] = []

    def compile(kernel: JITFunction[Any], grid: Any, args: Any, kwargs: Any) -> None:
        found = kernel.warmup(*args, grid=grid, **kwargs)
        compiled.append(Compiled(kernel.fn.__name__, found.metadata.shared, found.hash))

    triton.runtime.driver.set_active(driver)
    try:
        with replaced_launches(compile):
            yield compiled
    finally:
        if torch.cuda.is_available():  # else there is no other to go back to
            triton.runtime.driver.reset_active()


def attend(dtype: torch.dtype, head_dim: int, queries: int, special: bool, group: int, page: int) -> None:
    """One call of the attention backend, plain, or `special`: a sliding window, a soft cap, and few long rows, whose
    keys are split.
    """
    length, kv_heads = (512, 1) if special else (max(queries, 40), 8)
    blocks = -(-length // page)
    layout = KVLayout(1, kv_heads, head_dim, page, 1, 1, dtype)
    cache = KVCache.allocate(layout, blocks, torch.zeros(1, 1))
    positions = torch.arange(length - queries, length)[None]
    own = AttentionGroup(0, 1, queries, positions, torch.arange(blocks)[None], length, needs_mask=True)
    rows = torch.zeros(kv_heads * group, queries, head_dim, dtype=dtype).transpose(0, 1)
    window, softcap = (16, 30.0) if special else (None, None)
    paged_triton.attend(rows, own, 0, cache, 0.1, window, softcap)
