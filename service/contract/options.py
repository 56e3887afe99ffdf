"""EngineOptions: the part of the operator's settings that crosses to the engine's process, as plain data.

It stands apart from the loader so that the API process can name it without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of the engine's process; each field is a flag of `xlora-serve serve`."""

    model: str
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, float32, bfloat16, float16; auto = float32 on a CPU, the base's own on CUDA
    max_model_len: int | None = None  # None = as many as the base is made for
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # None = 256 on a CPU, 1024 on CUDA, or 4 * max_num_seqs
    kv_memory_bytes: int | None = None  # None = measured
    block_size: int = 16
    threads: int | None = None  # of each rank; None = all cores but one, divided among the ranks
    tensor_parallel: int = 1  # ranks that compute the model together, a process each
    lookahead: bool = True
    draft_depth: int | None = (
        None  # most tokens drafted per step by the scaling pass; None = as the bundle's layer does
    )
    speculative_tokens: int = 8  # most tokens drafted per step from earlier text; 0 = none
    prefix_cache: bool = True
    cuda_graphs: bool = True  # capture small steps, on a GPU
    allow_outside: bool = False
    native_kernels: bool = True  # C++ kernels, on a CPU; built in the background
    native_cache: str = "~/.cache/xlora-serve"  # where they are kept
    quantization: Literal["int8", "int4"] | None = None  # of the base's weights
    base: str | None = None  # a folder or a hub id instead of what the checkpoint says
    experts: tuple[str, ...] = ()  # "name=path": the same for experts
    gate_relu: bool | None = None  # whether the gate has ReLU between its layers, where the files do not say
    eos_from_tokenizer: bool = False  # the tokenizer's eos token ends texts too
    ordering: str | None = None  # a file with the order of experts and sites
