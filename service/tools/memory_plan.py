"""What a model takes of a machine's memory, told before it is loaded: `xlora-serve check --plan`.

The arithmetic is the loader's own: the model is built on the meta device by the code that builds it in earnest, and the
KV pool is divided and allocated there too. Knows sizes; no weight of the base is read, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.checkpoint import Checkpoint
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.engine.loader import expect_bfloat16
from service.engine.sizing import CUDA_KV_SHARE, allocate_cache, divide_memory, resolve_dtype
from service.model.loading.passes import outline_model
from service.model.loading.quantised import QuantisedLinear
from service.model.xlora_model import XLoraModel

_GIB, _MIB, _KIB = 1 << 30, 1 << 20, 1 << 10
_EXPERT_BUFFERS = ("lora_a", "lora_b_t")


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What the weights take in memory."""

    base: int
    experts: int  # their stacks
    classifier: int
    draft_head: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.experts + self.classifier + self.draft_head


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one engine, in bytes and tokens."""

    device: str  # cpu or cuda
    dtype: str  # of the arithmetic
    kept_dtypes: tuple[str, str]  # of the linears' weights where they are not quantised, and of the experts' stacks
    quantization: str | None
    gpu_bytes: int | None  # what was said to be free; None on a CPU
    weights: WeightBytes
    max_model_len: int
    max_num_seqs: int
    block_size: int
    kv_slot_bytes: int  # keys and values of one position of one stream
    gate_row_bytes: int  # of one slot
    num_blocks: int
    blocks_per_request: int  # of max_model_len tokens
    pool_bytes: int
    loading_bytes: int  # the weights' while they are loaded, before experts' are halved

    @property
    def tokens(self) -> int:
        """Positions that fit, each in two streams."""
        return self.num_blocks // 2 * self.block_size

    @property
    def full_requests(self) -> int:
        """Requests of max_model_len tokens that fit at once."""
        return self.num_blocks // self.blocks_per_request

    @property
    def reserve_bytes(self) -> int | None:
        """What is left of the GPU for activations and captured graphs."""
        return None if self.gpu_bytes is None else self.gpu_bytes - self.weights.total - self.pool_bytes


def plan_memory(checkpoint: Checkpoint, options: EngineOptions, gpu_bytes: int | None) -> MemoryPlan:
    """The plan for a GPU of which `gpu_bytes` are free before loading, or for a CPU (None).

    Raises CheckpointError and SettingsError as loading would, StartupError where the model does not fit.
    """
    device = torch.device("cpu" if gpu_bytes is None else "cuda")
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    model = outline_model(checkpoint, dtype=dtype, quantization=options.quantization)
    halved = [] if gpu_bytes is not None else expect_bfloat16(model, checkpoint, options)
    weights = weight_bytes(model, halved)
    free_bytes = None if gpu_bytes is None else _free_after(weights.total, gpu_bytes)
    sizes = divide_memory(model, options, device, free_bytes)
    plan = MemoryPlan(
        device=device.type,
        dtype=_name(dtype),
        kept_dtypes=(_kept(model, "weight", halved), _kept(model, "lora_a", halved)),
        quantization=options.quantization,
        gpu_bytes=gpu_bytes,
        weights=weights,
        max_model_len=sizes.max_model_len,
        max_num_seqs=options.max_num_seqs,
        block_size=options.block_size,
        kv_slot_bytes=sizes.layout.kv_slot_bytes,
        gate_row_bytes=sizes.layout.gate_row_bytes,
        num_blocks=sizes.num_blocks,
        blocks_per_request=sizes.layout.blocks_for(sizes.max_model_len),
        pool_bytes=allocate_cache(model, sizes).bytes,
        loading_bytes=_loading_bytes(model, [tensor for tensor in halved if isinstance(tensor, nn.Parameter)]),
    )
    if plan.reserve_bytes is not None and plan.reserve_bytes <= 0:
        raise StartupError(
            f"--kv-memory leaves {_size(plan.reserve_bytes)} of {_size(gpu_bytes or 0)} for activations",
            hint=f"leave --kv-memory out: it then takes {CUDA_KV_SHARE:.0%} of what the weights leave",
        )
    return plan


def weight_bytes(model: XLoraModel, halved: Sequence[Tensor] = ()) -> WeightBytes:
    """What the model's tensors take, each counted once however many modules share it; half of it those that will be
    kept in bfloat16.
    """
    half = {id(tensor) for tensor in halved}
    experts = base = 0
    for name, tensor in _tensors(model.causal_lm):
        taken = tensor.nbytes // 2 if id(tensor) in half else tensor.nbytes
        if name.rpartition(".")[2] in _EXPERT_BUFFERS:
            experts += taken
        else:
            base += taken
    quantised = (module for module in model.causal_lm.modules() if isinstance(module, QuantisedLinear))
    base += sum(module.bytes - module.get_buffer("packed").nbytes for module in quantised)
    classifier = sum(tensor.nbytes for _, tensor in _tensors(model.classifier))
    draft_head = 0 if model.draft_head is None else sum(tensor.nbytes for tensor in model.draft_head.tensors)
    return WeightBytes(base, experts, classifier, draft_head)


def _loading_bytes(model: XLoraModel, halved: Sequence[Tensor]) -> int:
    """The weights and the largest linear once more, and one linear upcast to see what the decoder computes."""
    return weight_bytes(model, halved).total + max((tensor.nbytes for tensor in halved), default=0)


def describe_plan(plan: MemoryPlan) -> str:
    """The plan as lines for people."""
    weights, position = plan.weights, 2 * (plan.kv_slot_bytes + plan.gate_row_bytes)
    linears, stacks = plan.kept_dtypes
    kind = plan.dtype if plan.quantization is None else f"{plan.quantization}, the rest {plan.dtype}"
    kind += f"; linears, without loss, {linears}" if linears != plan.dtype else ""
    lines = [
        f"memory       {plan.device}, {plan.dtype}" + (f", {_size(plan.gpu_bytes)}" if plan.gpu_bytes else ""),
        f"  base                     {_size(weights.base)}  ({kind})",
        f"  experts                  {_size(weights.experts)}  (their stacks, {stacks})",
        f"  classifier               {_size(weights.classifier)}  (float32)",
        f"  KV pool                  {_size(plan.pool_bytes)}  ({plan.num_blocks:,} blocks of {plan.block_size}"
        " positions, one for scratch)",
    ]
    if weights.draft_head:
        lines.insert(4, f"  draft head               {_size(weights.draft_head)}  ({plan.dtype})")
    if plan.loading_bytes > weights.total:
        lines.append(f"  while it loads           {_size(plan.loading_bytes)}  (experts not halved yet)")
    if plan.reserve_bytes is not None:
        lines.append(f"  left for activations     {_size(plan.reserve_bytes)}")
    return "\n".join(
        [
            *lines,
            f"  together                 {_size(weights.total + plan.pool_bytes)}",
            f"a position   {_size(position)} in two streams: keys and values 2 x {_size(plan.kv_slot_bytes)}, "
            f"gate rows 2 x {_size(plan.gate_row_bytes)}",
            f"room for     {plan.tokens:,} positions: {plan.full_requests} requests of {plan.max_model_len:,} tokens "
            f"at once (--max-num-seqs {plan.max_num_seqs})",
        ]
    )


def _kept(model: XLoraModel, name: str, halved: Sequence[Tensor]) -> str:
    """The narrowest dtype in which tensors of that name are kept."""
    half = {id(tensor) for tensor in halved}
    own = [tensor for full, tensor in _tensors(model.causal_lm) if full.rpartition(".")[2] == name]
    return "bfloat16" if any(id(tensor) in half for tensor in own) else _name(model.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _free_after(weights: int, gpu_bytes: int) -> int:
    if weights >= gpu_bytes:
        raise StartupError(
            f"the weights need {_size(weights)}, and the GPU has {_size(gpu_bytes)}",
            hint="take --dtype bfloat16, --quantization int8 or int4, or a larger GPU",
        )
    return gpu_bytes - weights


def _size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, name in ((_GIB, "GiB"), (_MIB, "MiB"), (_KIB, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
