"""Computes the memory of an engine before anything is loaded. defaults.py decides by it, and `check --plan` prints it.

It runs the loader's own code on the meta device, for the model and for the KV pool, so the plan cannot differ from what
is loaded. Knows sizes only; no weight is read, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from service.checkpoint import Checkpoint
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.engine.machine import Memory, host_memory
from service.engine.sizing import (
    CUDA_KV_FRACTION,
    MIN_CONTEXT,
    NoRoom,
    allocate_cache,
    as_text,
    divide_memory,
    resolve_dtype,
)
from service.model.adapted import AdaptedModule
from service.model.loading.context import read_context
from service.model.loading.passes import outline_model
from service.model.loading.quantised import BITS, QuantisedLinear
from service.model.targets import is_plain_linear
from service.model.xlora_model import XLoraModel

# On a CPU: the processes themselves (450 MB for the demo's server, without weights and pool) and activations.
PROCESS_BYTES = 768 << 20
MEMORY_FRACTION = 0.8  # of a CPU's memory, where the operator does not set --max-model-len
FindBfloat16 = Callable[[XLoraModel, Checkpoint, EngineOptions], Sequence[Tensor]]

_EXPERT_BUFFERS = ("lora_a", "lora_b_t")


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """The bytes of the weights in memory, by kind."""

    base: int
    experts: int  # the stacked LoRA matrices
    classifier: int
    draft_head: int = 0
    draft_layer: int = 0

    @property
    def total(self) -> int:
        return self.base + self.experts + self.classifier + self.draft_head + self.draft_layer


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one engine, in bytes and tokens."""

    device: str  # cpu or cuda
    dtype: str  # of the arithmetic
    stored_dtypes: tuple[str, str]  # of linears that are not quantised, and of the experts' stacks
    quantization: str | None
    memory: Memory
    weights: WeightBytes
    max_model_len: int
    base_max_model_len: int  # the context length that the base was trained for
    max_num_seqs: int
    block_size: int
    kv_slot_bytes: int  # keys and values of one position of one stream
    gate_row_bytes: int  # of one slot
    num_blocks: int
    blocks_per_request: int  # of max_model_len tokens
    pool_bytes: int

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
        """The bytes of a GPU that are left for activations and captured graphs."""
        return None if self.device == "cpu" else self.memory.total - self.weights.total - self.pool_bytes


def plan_memory(
    checkpoint: Checkpoint, options: EngineOptions, gpu_bytes: int | None, find_bfloat16: FindBfloat16
) -> MemoryPlan:
    """The plan for a GPU with `gpu_bytes` free before loading, or for this machine's CPU (None). `find_bfloat16`
    returns the tensors of a model that a CPU will store in bfloat16 under float32 arithmetic.

    Raises CheckpointError and SettingsError as loading would, StartupError where the model does not fit.
    """
    device = torch.device("cpu" if gpu_bytes is None else "cuda")
    memory = host_memory() if gpu_bytes is None else Memory(gpu_bytes, "the GPU")
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    model = outline_model(checkpoint, dtype=dtype, is_for_cpu=gpu_bytes is None, quantization=options.quantization)
    in_bfloat16 = [] if gpu_bytes is not None else find_bfloat16(model, checkpoint, options)
    weights = weight_bytes(model, in_bfloat16)
    usable = usable_bytes(memory, options, device)
    try:
        if weights.total >= usable:
            raise NoRoom(f"the weights need {as_text(weights.total)}")
        sizes = divide_memory(model, options, device, usable - weights.total)
        pool_bytes = allocate_cache(model, sizes).bytes
        is_asked_for = device.type == "cpu" and options.kv_memory_bytes is not None
        if is_asked_for and weights.total + pool_bytes > memory.total - PROCESS_BYTES:
            needs = f"the weights need {as_text(weights.total)}, --kv-memory {as_text(pool_bytes)} more"
            given = f"{memory.origin} has {as_text(memory.total - PROCESS_BYTES)} for both"
            raise NoRoom(f"{needs}; {given}", hint="lower --kv-memory, or leave it out")
    except NoRoom as error:
        if error.hint is not None and options.kv_memory_bytes is not None:
            raise  # its hint is already about the operator's own --kv-memory
        given = as_text(usable) + (f" of {as_text(memory.total)}" if usable < memory.total else "")
        hint = _fitting_settings(model, options, weights.total, in_bfloat16, usable, memory, device)
        message = f"{error.message}; {memory.origin} has {given} for weights, keys and values"
        raise NoRoom(message, hint=hint) from None
    plan = MemoryPlan(
        device=device.type,
        dtype=_name(dtype),
        stored_dtypes=(_stored_dtype(model, "weight", in_bfloat16), _stored_dtype(model, "lora_a", in_bfloat16)),
        quantization=options.quantization,
        memory=memory,
        weights=weights,
        max_model_len=sizes.max_model_len,
        base_max_model_len=read_context(model.config).default_tokens,
        max_num_seqs=options.max_num_seqs,
        block_size=options.block_size,
        kv_slot_bytes=sizes.layout.kv_slot_bytes,
        gate_row_bytes=sizes.layout.gate_row_bytes,
        num_blocks=sizes.num_blocks,
        blocks_per_request=sizes.layout.blocks_for(sizes.max_model_len),
        pool_bytes=pool_bytes,
    )
    if plan.reserve_bytes is not None and plan.reserve_bytes <= 0:
        raise StartupError(
            f"--kv-memory leaves {as_text(plan.reserve_bytes)} of {as_text(memory.total)} for activations",
            hint=f"leave --kv-memory out: it then takes {CUDA_KV_FRACTION:.0%} of what the weights leave",
        )
    return plan


def usable_bytes(memory: Memory, options: EngineOptions, device: torch.device) -> int:
    """Bytes that weights and KV pool may take together."""
    if device.type == "cuda":
        return memory.total
    fraction = MEMORY_FRACTION if options.max_model_len is None else 1.0
    return min(int(memory.total * fraction), memory.total - PROCESS_BYTES)


def _fitting_settings(
    model: XLoraModel,
    options: EngineOptions,
    weights: int,
    in_bfloat16: Sequence[Tensor],
    usable: int,
    memory: Memory,
    device: torch.device,
) -> str:
    """A hint with settings under which the model would fit, by its sizes."""
    layout = model.kv_layout(options.block_size)
    if options.kv_memory_bytes is not None:
        usable -= options.kv_memory_bytes
    wanted = options.max_model_len or min(read_context(model.config).default_tokens, MIN_CONTEXT)
    needed = 0 if options.kv_memory_bytes is not None else layout.blocks_for(wanted) * layout.block_bytes
    everything = usable_bytes(memory, replace(options, max_model_len=wanted), device)
    tokens = min((everything - weights) // layout.block_bytes // 2 * layout.block_size, wanted)
    found = [f"--max-model-len {tokens}"] if tokens >= layout.block_size and needed else []
    smallest = weights
    if options.quantization is None:
        half = {id(tensor) for tensor in in_bfloat16}
        linears = [linear.weight for linear in _quantisable(model)]
        others = weights - sum(tensor.nbytes // 2 if id(tensor) in half else tensor.nbytes for tensor in linears)
        for kind, bits in BITS.items():
            smallest = others + int(sum(tensor.numel() for tensor in linears) * bits / 8)
            if smallest + needed <= usable:
                found.append(f"--quantization {kind}")
                break
    if found:
        return f"this fits: {' or '.join(found)}"
    return f"nothing does: the least that its weights can take is {as_text(smallest)}"


def _quantisable(model: XLoraModel) -> Iterator[Any]:
    """The decoder's linears that --quantization packs: all but the head's, with and without experts."""
    for module in model.decoder.modules():
        is_adapted = isinstance(module, AdaptedModule) and module.base is None
        if is_adapted or (not isinstance(module, AdaptedModule) and is_plain_linear(module)):
            yield module


def weight_bytes(model: XLoraModel, in_bfloat16: Sequence[Tensor] = ()) -> WeightBytes:
    """Bytes of the model's tensors. A tensor that several modules use counts once; one that will be stored in bfloat16
    counts half.
    """
    half = {id(tensor) for tensor in in_bfloat16}
    experts = base = 0
    for name, tensor in _tensors(model.causal_lm):
        taken = tensor.nbytes // 2 if id(tensor) in half else tensor.nbytes
        if name.rpartition(".")[2] in _EXPERT_BUFFERS:
            experts += taken
        else:
            base += taken
    quantised = (module for module in model.causal_lm.modules() if isinstance(module, QuantisedLinear))
    base += sum(module.bytes - module.get_buffer("packed").nbytes for module in quantised)
    classifier = _bytes(model.classifier)
    draft_head = 0 if model.draft_head is None else _bytes(model.draft_head)
    draft_layer = 0 if model.draft_chain is None else _bytes(model.draft_chain.layer)
    return WeightBytes(base, experts, classifier, draft_head, draft_layer)


def _stored_dtype(model: XLoraModel, name: str, in_bfloat16: Sequence[Tensor]) -> str:
    """The smallest dtype in which tensors of that name are stored."""
    half = {id(tensor) for tensor in in_bfloat16}
    own = [tensor for full, tensor in _tensors(model.causal_lm) if full.rpartition(".")[2] == name]
    return "bfloat16" if any(id(tensor) in half for tensor in own) else _name(model.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
