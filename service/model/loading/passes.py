"""Builds a model from a checkpoint: the list of passes over the base, in their order, with the reasons for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.distributed.configuration_utils import DistributedConfig

from service.checkpoint import Checkpoint
from service.contract.errors import CheckpointError
from service.model.attention.paged import ATTENTION
from service.model.dtypes import bfloat16_if_lossless
from service.model.loading.parallel import Shards, split
from service.model.loading.parallel_plan import Ranks
from service.model.loading.quantised import Quantization, quantise
from service.model.loading.rope import fix_longrope
from service.model.loading.skeleton import build_skeleton, read_config, skeleton_of
from service.model.loading.weights import place_weights
from service.model.targets import resolve_sites
from service.model.xlora_model import XLoraModel

FindCandidates = Callable[[Checkpoint], Collection[str]]


def _quiet(_: str) -> None:
    """Discards progress."""


@dataclass
class Loading:
    """The arguments of a load, and its state between the passes."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None = None
    max_model_len: int | None = None  # None: the base's own
    is_for_cpu: bool = False  # of an outline on the meta device
    ranks: Ranks | None = None  # every rank must load at the same time
    find_candidates: FindCandidates | None = None  # see `bfloat16_candidates`
    on_progress: Callable[[str], None] = _quiet
    skeleton: Any = None  # the whole base's modules, without weights
    causal_lm: Any = None  # the base with weights, or this rank's shard of it
    shards: Shards | None = None  # None: the whole base
    model: XLoraModel | None = None

    @cached_property
    def bfloat16_candidates(self) -> Collection[str]:
        """Linears whose weights and experts are to be stored in bfloat16 where that is lossless."""
        return () if self.find_candidates is None else self.find_candidates(self.checkpoint)


def check_servable(loading: Loading) -> None:
    """Raises CheckpointError for a base that cannot be served exactly and for experts that cannot adapt it."""
    loading.skeleton = skeleton_of(loading.checkpoint)
    resolve_sites(loading.checkpoint, loading.skeleton)


def read_weights(loading: Loading) -> None:
    """Loads the base's weights to the device, layer by layer, and quantises each layer, or stores it in bfloat16, as it
    arrives. Raises CheckpointError for a missing tensor, which transformers would fill with random numbers.
    """
    checkpoint = loading.checkpoint
    loading.on_progress(f"loading base model from {checkpoint.base_path}")
    if loading.ranks is not None:
        loading.causal_lm = _read_shard(loading)
        return
    causal_lm = loading.causal_lm = build_skeleton(checkpoint.base_path, loading.dtype)
    tensors = checkpoint.base_tensors
    is_bfloat16 = checkpoint.base_dtypes == {torch.bfloat16}
    unconverted = set() if is_bfloat16 else set(loading.bfloat16_candidates)

    def after_layer() -> None:
        if loading.quantization is not None:
            quantise(causal_lm, loading.quantization, loading.device, for_cpu=loading.device.type == "cpu")
        _store_in_bfloat16(causal_lm, unconverted)

    place_weights(
        causal_lm,
        tensors,
        loading.device,
        in_bfloat16=loading.bfloat16_candidates if is_bfloat16 else (),
        after_layer=after_layer,
        on_progress=loading.on_progress,
    )


def _store_in_bfloat16(causal_lm: Any, names: set[str]) -> None:
    """Converts loaded weights to bfloat16 where that is lossless, and removes the names of loaded ones from `names`."""
    for name in sorted(names):
        linear = causal_lm.get_submodule(name)
        if not linear.weight.is_meta:
            linear.weight = nn.Parameter(bfloat16_if_lossless(linear.weight.detach()), requires_grad=False)
            names.remove(name)


def _read_shard(loading: Loading) -> Any:
    """This rank's shard of the base, which transformers divides while it reads."""
    base, ranks = loading.checkpoint.base_path, loading.ranks
    assert ranks is not None
    plan = DistributedConfig(tp_plan="auto", tp_size=ranks.size)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, config=read_config(base), dtype=loading.dtype, distributed_config=plan, **_quietly()
        )
    except ValueError as error:  # older versions require more sizes to be divisible than check_plan does
        raise CheckpointError(
            f"{base}: transformers {transformers.__version__} does not divide it: {error}",
            hint="use a newer version, or another --tensor-parallel",
        ) from error
    causal_lm, report = loaded
    for defect in ("missing_keys", "mismatched_keys"):
        if report[defect]:
            names = ", ".join(sorted(map(str, report[defect]))[:3])
            raise CheckpointError(f"{base}: {defect.replace('_', ' ')} in the base's weights: {names}")
    return causal_lm


def _quietly() -> dict[str, Any]:
    """Arguments of from_pretrained: no download, no remote code, and a report on missing tensors."""
    return {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "generation_config": GenerationConfig(),  # type: ignore[no-untyped-call]  # unused; so its file is not read
        "output_loading_info": True,
    }


def build_on_meta(loading: Loading) -> None:
    """Replaces read_weights in an outline: builds the modules on the meta device, in the load's dtype."""
    loading.causal_lm = build_skeleton(loading.checkpoint.base_path, loading.dtype)


def use_paged_attention(loading: Loading) -> None:
    """Sets attention over the paged KV cache."""
    loading.causal_lm.set_attn_implementation(ATTENTION)


def fix_rope(loading: Loading) -> None:
    """Fixes one set of RoPE frequencies for texts of every length."""
    fix_longrope(loading.causal_lm, loading.max_model_len, loading.on_progress)


def quantise_on_meta(loading: Loading) -> None:
    """Quantises an outline's linears. With weights, read_weights does it layer by layer."""
    if loading.quantization is not None:
        quantise(loading.causal_lm, loading.quantization, loading.device, for_cpu=loading.is_for_cpu)


def move_to_device(loading: Loading) -> None:
    """Moves the remaining tensors (buffers) to the device, and sets the model to inference."""
    loading.causal_lm.to(loading.device).eval().requires_grad_(False)


def localise_shards(loading: Loading) -> None:
    """Replaces the modules that transformers has divided among ranks by plain local ones."""
    if loading.ranks is not None:
        loading.shards = split(loading.causal_lm, loading.skeleton, loading.ranks)


def add_experts(loading: Loading) -> None:
    """Builds the XLoraModel: experts on their modules, gate, classifier, and a tap around the decoder."""
    checkpoint, device, dtype = loading.checkpoint, loading.device, loading.dtype
    loading.on_progress(f"stacking experts: {', '.join(expert.name for expert in checkpoint.experts)}")
    loading.model = XLoraModel(
        checkpoint,
        loading.causal_lm,
        device=device,
        dtype=dtype,
        shards=loading.shards,
        bfloat16_candidates=loading.bfloat16_candidates,
    )


Passes = Sequence[Callable[[Loading], None]]
BASE_PASSES: Passes = (
    check_servable,  # first: it takes milliseconds, and reading weights takes minutes
    read_weights,  # quantises layer by layer, so that no memory holds the whole base in a larger dtype
    use_paged_attention,  # while all modules are still transformers' own, because the setter walks through them
    fix_rope,  # before the move: computed on the CPU, frequencies are equal on every device
    move_to_device,
)
MODEL_PASSES: Passes = (
    *BASE_PASSES,
    localise_shards,  # before experts are added: they are sliced like the modules that they adapt
    add_experts,  # last: stacks are built on the device, and the tap changes every module's name
)
# An outline does not run, so it needs no attention and no RoPE, and it stays on the meta device.
OUTLINE_PASSES: Passes = (check_servable, build_on_meta, quantise_on_meta, add_experts)


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
    ranks: Ranks | None = None,
    bfloat16_candidates: FindCandidates | None = None,
    on_progress: Callable[[str], None] = _quiet,
) -> XLoraModel:
    """Builds the model, or this rank's shard of it, on `device`. `bfloat16_candidates` finds the linears that are to be
    stored in bfloat16 where that is lossless. The checkpoint's expert tensors can be dropped afterwards, because stacks
    are copies. Raises CheckpointError as the passes do.
    """
    loading = Loading(
        checkpoint,
        device,
        dtype,
        quantization,
        max_model_len,
        ranks=ranks,
        find_candidates=bfloat16_candidates,
        on_progress=on_progress,
    )
    run(loading, MODEL_PASSES)
    assert loading.model is not None
    return loading.model


def outline_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, is_for_cpu: bool, quantization: Quantization | None = None
) -> XLoraModel:
    """Builds the model of load_model on the meta device: all modules with their sizes, without reading weights. Raises
    CheckpointError as load_model does, except for defects of the weights' values.
    """
    loading = run(Loading(checkpoint, torch.device("meta"), dtype, quantization, is_for_cpu=is_for_cpu), OUTLINE_PASSES)
    assert loading.model is not None
    return loading.model


def run(loading: Loading, passes: Passes) -> Loading:
    """Runs the passes in their order."""
    for each in passes:
        each(loading)
    return loading
