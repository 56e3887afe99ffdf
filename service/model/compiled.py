"""The decode step compiled ahead of time by torch's AOTInductor: C++ without Python, for one kind of CPU.

Compiling takes about a minute and a C++ compiler; loading takes milliseconds. A package holds code only: weights stay
the model's own, and number of rows, context and KV blocks are free, so that one or two packages serve a model for good.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.export import Dim

import service.model as package
from service.model import decode_kernels, kernel_library
from service.model.batch import LINES, AttentionGroup, Batch
from service.model.compile_cache import scratch_in
from service.model.decode_step import DecodeStep
from service.model.kv_cache import KVCache, KVLayout
from service.model.linear import XLoraLinear
from service.model.xlora_model import ForwardOutput, XLoraModel

_MIN = 2  # torch.export takes a size of 1 for a constant
_MANY = 16  # rows, from which on a second package may pay


def fingerprint(model: XLoraModel, layout: KVLayout, threads: int) -> str:
    """What a compiled step depends on, as 32 hexadecimal digits: shapes, configuration, code, versions and CPU.

    Not on which kernels the linears prefer: any choice is right, and it is measured anew in every process.
    """
    step = DecodeStep(model)
    config = model.config.to_dict() | {"_name_or_path": None}
    tensors = sorted(
        (name, tuple(value.shape), value.stride(), str(value.dtype)) for name, value in step.state().items()
    )
    sources = [*sorted(Path(inspect.getfile(package)).parent.glob("*.py")), *kernel_library.sources()]
    code = [path.read_text() for path in sources]
    cpu = (platform.machine(), torch.backends.cpu.get_cpu_capability(), kernel_library.cpu_flags())
    parts = (
        config,
        model.xlora_config,
        tensors,
        layout,
        threads,
        code,
        torch.__version__,
        transformers.__version__,
        cpu,
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def compile_step(model: XLoraModel, layout: KVLayout, folder: Path, threads: int) -> None:
    """Compiles the step for `model` on the CPU into `folder`, which is there as a whole or not at all; the kernels that
    it calls are beside the folder.

    Takes about half a minute per package. Where two processes compile the same, the first one's stays. Raises whatever
    torch.export or the C++ compiler has to say.
    """
    if _has_kernels(model):
        kernel_library.provide(folder.parent)
    with scratch_in(folder.parent) as scratch:
        made = scratch / folder.name
        made.mkdir()
        for least_rows in _least_rows(model):
            torch._inductor.aoti_compile_and_package(
                _export(model, layout, least_rows),
                package_path=str(_package(made, least_rows)),
                inductor_configs={
                    "aot_inductor.package_constants_in_so": False,
                    "cpp.threads": threads,
                    **decode_kernels.inductor_configs(),
                },
            )
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.exists():
                raise
            # Another server was faster, and its package is as good.


def _export(model: XLoraModel, layout: KVLayout, least_rows: int) -> torch.export.ExportedProgram:
    rows, gated, width = Dim("rows", min=_MIN), Dim("gated", min=_MIN), Dim("width", min=_MIN)
    pool, gate_rows = [{0: Dim("blocks")}] * layout.layers, {0: Dim("slots")}
    cache = KVCache.allocate(layout, 8, model.dummy_row)
    example = [torch.zeros(shape, dtype=torch.int64) for shape in ((LINES, 7), (4,), (7, 5))]
    with torch.no_grad():
        return torch.export.export(
            DecodeStep(model, least_rows, kernels=_has_kernels(model)),
            (*example, cache.keys, cache.values, cache.gate_rows),
            dynamic_shapes=({1: rows}, {0: gated}, {0: rows, 1: width}, pool, pool, gate_rows),
            strict=False,
        )


def _least_rows(model: XLoraModel) -> list[int]:
    """From how many rows on which package is best: one for any number, one more where linears then change kernels."""
    if model.is_narrow:  # the BLAS libraries would want wide copies in every step
        return [1]
    linears = [module for module in model.causal_lm.modules() if isinstance(module, XLoraLinear)]
    return [1, *([_MANY] if any(1 < linear.onednn_rows <= _MANY for linear in linears) else [])]


def _has_kernels(model: XLoraModel) -> bool:
    return model.dtype in decode_kernels.DTYPES


def _package(folder: Path, least_rows: int) -> Path:
    return folder / f"rows-{least_rows}.pt2"


class CompiledStep:
    """A compiled step, loaded, over the weights of `model`."""

    def __init__(self, folder: Path, model: XLoraModel, block_size: int) -> None:
        """Loads and tries it. Raises RuntimeError or KeyError for a package that does not belong to this model."""
        self._scaling_pass_has_experts = model.scaling_pass_has_experts
        state = DecodeStep(model).state()
        if _has_kernels(model):
            kernel_library.provide(folder.parent)
        self._packages: dict[int, Any] = {}  # by least rows, most first
        for least_rows in (_MANY, 1):
            if least_rows == _MANY and not _package(folder, least_rows).exists():
                continue
            package = torch._inductor.aoti_load_package(str(_package(folder, least_rows)))
            constants = {name: state[name] for name in package.get_constant_fqns()}
            package.load_constants(constants, check_full_update=True, user_managed=True)
            self._packages[least_rows] = package
        cache = KVCache.allocate(model.kv_layout(block_size), 1, model.dummy_row)
        for count in self._packages:
            none = torch.zeros(count, dtype=torch.int64)
            slots = [none + cache.dummy_slot, none + cache.scratch_slot]
            group = AttentionGroup(0, count, 1, none[:, None], none[:, None], block_size, needs_mask=True)
            self.forward(Batch(torch.stack([none, none, none, *slots, none]), 1, none, [group]), cache)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """XLoraModel.forward of a batch whose rows attend alone."""
        [group] = batch.groups
        rows, table = batch.rows, group.block_table
        count = rows.shape[1]
        if count < _MIN:
            rows, table = _with_idle_row(rows, kv_cache), table.expand(_MIN, -1)
        if table.shape[1] < _MIN:
            table = table.expand(-1, _MIN)  # a block seen twice: positions mask the second
        gated = self._scaling_pass_has_experts or batch.scaling_rows_are_gated
        first = 0 if gated else min(batch.num_scaling_rows, rows.shape[1] - _MIN)
        run = next(package for least, package in self._packages.items() if count >= least)
        logits, gate_logits = run(
            rows, rows[3, first:], table.contiguous(), kv_cache.keys, kv_cache.values, kv_cache.gate_rows
        )
        return ForwardOutput(logits.index_select(0, batch.logit_rows), gate_logits[: batch.num_scaling_rows])


def _with_idle_row(rows: Tensor, kv_cache: KVCache) -> Tensor:
    """rows [6, 1] and one more, whose keys, values and scalings are thrown away."""
    scratch = kv_cache.scratch_slot
    idle = torch.tensor([[0], [0], [scratch], [kv_cache.dummy_slot], [scratch], [0]])
    return torch.cat([rows, idle], 1)
