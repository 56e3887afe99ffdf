"""From a checkpoint to its model: the passes over the base, in the order in which they must run, and why so."""

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
from service.model.loading.parallel import Shards, split
from service.model.loading.parallel_plan import Ranks
from service.model.loading.quantised import Quantization, quantise
from service.model.loading.rope import settle_longrope
from service.model.loading.skeleton import build_skeleton, read_config, skeleton_of
from service.model.loading.weights import place_weights
from service.model.targets import resolve_sites
from service.model.transfer import narrowed
from service.model.xlora_model import XLoraModel

Keeps = Callable[[Checkpoint], Collection[str]]


def _quiet(_: str) -> None:
    """Progress that nobody follows."""


@dataclass
class Loading:
    """A base on its way to a model, and what was asked of it."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None = None
    max_model_len: int | None = None  # None: as many tokens as the base takes
    is_for_cpu: bool = False  # of an outline on the meta device
    ranks: Ranks | None = None  # every rank must load at the same time
    names_kept_bfloat16: Keeps | None = None  # which linears of a base may stay as they are stored
    on_progress: Callable[[str], None] = _quiet
    skeleton: Any = None  # the base's modules without weights, whole
    causal_lm: Any = None  # the base with weights, or this rank's part of it
    shards: Shards | None = None  # which part that is; None: all
    model: XLoraModel | None = None

    @cached_property
    def kept(self) -> Collection[str]:
        """Linears whose weights and experts may be kept in bfloat16, if they lose nothing by it."""
        return () if self.names_kept_bfloat16 is None else self.names_kept_bfloat16(self.checkpoint)


def judge(loading: Loading) -> None:
    """Raises CheckpointError for a base that cannot be served exactly and for experts that cannot adapt it."""
    loading.skeleton = skeleton_of(loading.checkpoint)
    resolve_sites(loading.checkpoint, loading.skeleton)


def read_weights(loading: Loading) -> None:
    """Raises CheckpointError where a tensor is missing, which transformers would fill with random numbers."""
    checkpoint = loading.checkpoint
    loading.on_progress(f"loading base model from {checkpoint.base_path}")
    if loading.ranks is not None:
        loading.causal_lm = _divided(loading)
        return
    causal_lm = loading.causal_lm = build_skeleton(checkpoint.base_path, loading.dtype)
    tensors = checkpoint.base_tensors
    is_bfloat16 = checkpoint.base_dtypes == {torch.bfloat16}
    unseen = set() if is_bfloat16 else set(loading.kept)

    def after_layer() -> None:
        if loading.quantization is not None:
            quantise(causal_lm, loading.quantization, loading.device, for_cpu=loading.device.type == "cpu")
        _narrow(causal_lm, unseen)

    place_weights(
        causal_lm,
        tensors,
        loading.device,
        stays_bfloat16=loading.kept if is_bfloat16 else (),
        after_layer=after_layer,
        on_progress=loading.on_progress,
    )


def _narrow(causal_lm: Any, names: set[str]) -> None:
    """Keeps weights that have come in bfloat16 if they lose nothing by it; they leave `names`."""
    for name in sorted(names):
        linear = causal_lm.get_submodule(name)
        if not linear.weight.is_meta:
            linear.weight = nn.Parameter(narrowed(linear.weight.detach()), requires_grad=False)
            names.remove(name)


def _divided(loading: Loading) -> Any:
    """This rank's part of the base, which transformers cuts out as it reads."""
    base, ranks = loading.checkpoint.base_path, loading.ranks
    assert ranks is not None
    plan = DistributedConfig(tp_plan="auto", tp_size=ranks.size)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, config=read_config(base), dtype=loading.dtype, distributed_config=plan, **_quietly()
        )
    except ValueError as error:  # older versions want more to be divisible than check_plan does
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
    """How transformers is called: nothing is downloaded or run, and what it misses is reported."""
    return {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "generation_config": GenerationConfig(),  # type: ignore[no-untyped-call]  # nothing reads it, nor its file
        "output_loading_info": True,
    }


def outline(loading: Loading) -> None:
    """In the place of read_weights: modules on the meta device, in the dtype that was asked for."""
    loading.causal_lm = build_skeleton(loading.checkpoint.base_path, loading.dtype)


def attend(loading: Loading) -> None:
    """Attention over the paged KV cache."""
    loading.causal_lm.set_attn_implementation(ATTENTION)


def settle_rope(loading: Loading) -> None:
    """One set of frequencies for texts of every length."""
    settle_longrope(loading.causal_lm, loading.max_model_len, loading.on_progress)


def quantise_linears(loading: Loading) -> None:
    """Linears in 8 or 4 bit, of modules without weights."""
    if loading.quantization is not None:
        quantise(loading.causal_lm, loading.quantization, loading.device, for_cpu=loading.is_for_cpu)


def move(loading: Loading) -> None:
    """Tensors that are not there yet go to the device; all is for inference."""
    loading.causal_lm.to(loading.device).eval().requires_grad_(False)


def divide(loading: Loading) -> None:
    """Plain local modules in the place of transformers' divided ones."""
    if loading.ranks is not None:
        loading.shards = split(loading.causal_lm, loading.skeleton, loading.ranks)


def assemble(loading: Loading) -> None:
    """Experts on their modules, and a tap around the decoder."""
    checkpoint, device, dtype = loading.checkpoint, loading.device, loading.dtype
    loading.on_progress(f"stacking experts: {', '.join(expert.name for expert in checkpoint.experts)}")
    loading.model = XLoraModel(
        checkpoint, loading.causal_lm, device=device, dtype=dtype, shards=loading.shards, kept_bfloat16=loading.kept
    )


Passes = Sequence[Callable[[Loading], None]]
BASE_PASSES: Passes = (
    judge,  # first: this takes milliseconds, and reading weights minutes
    read_weights,  # to the device, quantised layer by layer: neither holds the whole base in a wider dtype
    attend,  # while all modules are still transformers' own, which it walks through
    settle_rope,  # before the move: computed on the CPU, frequencies are the same for every device
    move,
)
MODEL_PASSES: Passes = (
    *BASE_PASSES,
    divide,  # before experts come: each rank's part of them is cut as the module is that they adapt
    assemble,  # last: stacks are made on the device, and the tap changes every module's name
)
OUTLINE_PASSES: Passes = (judge, outline, quantise_linears, assemble)  # nothing attends, and nothing is moved from meta


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
    ranks: Ranks | None = None,
    names_kept_bfloat16: Keeps | None = None,
    on_progress: Callable[[str], None] = _quiet,
) -> XLoraModel:
    """Builds the model, or this rank's part of it, on `device`. The checkpoint's expert tensors can be dropped
    afterwards: stacks are copies. Raises CheckpointError as the passes do.
    """
    loading = Loading(
        checkpoint,
        device,
        dtype,
        quantization,
        max_model_len,
        ranks=ranks,
        names_kept_bfloat16=names_kept_bfloat16,
        on_progress=on_progress,
    )
    run(loading, MODEL_PASSES)
    assert loading.model is not None
    return loading.model


def outline_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, is_for_cpu: bool, quantization: Quantization | None = None
) -> XLoraModel:
    """Build the model of load_model on the meta device: every module and its size, and no weight is read.
    Raises CheckpointError as load_model does for what the weights' values do not decide.
    """
    loading = run(Loading(checkpoint, torch.device("meta"), dtype, quantization, is_for_cpu=is_for_cpu), OUTLINE_PASSES)
    assert loading.model is not None
    return loading.model


def run(loading: Loading, passes: Passes) -> Loading:
    """Runs the passes one after the other."""
    for each in passes:
        each(loading)
    return loading
