"""Builds an Engine from options: reads the checkpoint, loads the model, divides the memory, chooses the step.

Knows the order; each part is decided elsewhere (defaults.py, sizing.py, model/loading/, native/).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from service import __version__, native
from service.checkpoint import Checkpoint, Overrides, load_checkpoint
from service.contract.engine_info import EngineInfo
from service.contract.errors import XLoraError
from service.contract.options import EngineOptions
from service.engine.block_manager import BlockManager
from service.engine.defaults import resolve_options, summarise
from service.engine.engine import Engine
from service.engine.gate.report import GateReporter
from service.engine.memory_plan import MemoryPlan
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Scheduler
from service.engine.sequence import LOOKAHEAD_RATE
from service.engine.sizing import (
    Sizes,
    allocate_cache,
    divide_memory,
    free_device_bytes,
    resolve_device,
    resolve_dtype,
)
from service.engine.speculation.costs import StepCost
from service.engine.speculation.layer_drafts import idle_choices
from service.engine.step_cost import MANY_ROWS, measure_steps
from service.engine.tensor_parallel.group import Group, Leader, check_options
from service.engine.threads import resolve_threads
from service.grammar import GrammarCompiler, Grammars
from service.model.freed_memory import keep_freed_memory
from service.model.loading.parallel_plan import Ranks
from service.model.loading.passes import load_model
from service.model.loading.skeleton import check_divisible, inspect_base
from service.model.steps.cuda_graph import CapturedSteps, GraphCapture
from service.model.steps.warm_up import warm_up
from service.model.xlora_model import XLoraModel

_MAX_DRAFTING_ROWS = 256  # of a captured step: in larger ones, drafts of several tokens seldom pay
_MAX_SCORED_LOGITS = 16 << 20  # of a step's prompt_logprobs: 64 MiB


def load_engine(
    options: EngineOptions,
    on_progress: Callable[[str], None] = lambda _: None,
    on_lost: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Loads everything and returns an idle engine; with options.tensor_parallel > 1, one that leads other ranks.

    Raises CheckpointError for a defect of the bundle, SettingsError for an impossible option, StartupError for a
    machine that is too small. `on_lost` is called, from another thread, when another rank's process has ended.
    """
    if options.tensor_parallel == 1:
        checkpoint = read_checkpoint(options, on_progress)
        device = resolve_device(options.device)
        asked = options
        options, plan = resolve_options(checkpoint, options, device, free_device_bytes(device), bfloat16_tensors)
        on_progress(summarise(plan, asked))
        return build_engine(_verified_model(checkpoint, options, on_progress), checkpoint, options, None, on_progress)
    check_options(options)
    on_progress(f"starting {options.tensor_parallel} ranks")
    group = Group(options.tensor_parallel, on_lost)
    try:
        checkpoint = read_checkpoint(options, on_progress)
        check_divisible(checkpoint, options.tensor_parallel)  # or every rank would refuse it, after a long start
        group.join()
        return load_group_engine(group, checkpoint, options, on_progress)
    except BaseException:
        group.close()
        raise


def load_group_engine(
    group: Group,
    checkpoint: Checkpoint,
    options: EngineOptions,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Engine:
    """An engine over a group whose ranks have joined. An earlier engine of the group must not be used any more."""
    group.load(options)
    try:
        model = _verified_model(checkpoint, options, on_progress, group.ranks)
    except XLoraError:
        raise
    except Exception as error:
        raise group.failure(error) from error
    return build_engine(model, checkpoint, options, group, on_progress)


def load_checkpoint_and_model(
    options: EngineOptions, on_progress: Callable[[str], None] = lambda _: None, ranks: Ranks | None = None
) -> tuple[XLoraModel, Checkpoint]:
    """The model, or this rank's shard of it, on its device, and its checkpoint. Sets the number of threads."""
    checkpoint = read_checkpoint(options, on_progress)
    if ranks is None:
        return _verified_model(checkpoint, options, on_progress), checkpoint
    return load_model_of(checkpoint, options, on_progress, ranks), checkpoint


def read_checkpoint(options: EngineOptions, on_progress: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """The checkpoint that the options name, without the weights of base and experts."""
    on_progress(f"reading {options.model}")
    overrides = Overrides.parse(
        options.base, options.experts, options.ordering, options.gate_relu, options.eos_from_tokenizer
    )
    return load_checkpoint(
        options.model,
        overrides=overrides,
        allow_outside=options.allow_outside,
        examine_weights=False,
        inspect_base=inspect_base,
        on_progress=on_progress,
    )


def _verified_model(
    checkpoint: Checkpoint, options: EngineOptions, on_progress: Callable[[str], None], ranks: Ranks | None = None
) -> XLoraModel:
    """The model; its files are compared with their hashes while they are loaded."""
    assert checkpoint.files is not None
    with checkpoint.files.verifying():
        return load_model_of(checkpoint, options, on_progress, ranks)


def load_model_of(
    checkpoint: Checkpoint, options: EngineOptions, on_progress: Callable[[str], None], ranks: Ranks | None = None
) -> XLoraModel:
    """The model of a checkpoint, or this rank's shard of it, on its device. Sets the number of threads."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # on_progress reports instead
    threads, idle_priority = resolve_threads(options)
    torch.set_num_threads(threads)
    native.use_threads(threads, idle_priority)
    device = resolve_device(options.device)
    if ranks is not None and device.type == "cuda":
        device = torch.device("cuda", ranks.rank)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    return load_model(
        checkpoint,
        device=device,
        dtype=dtype,
        quantization=options.quantization,
        max_model_len=options.max_model_len,
        ranks=ranks,
        bfloat16_candidates=native.bfloat16_candidates if _can_have_native(options, device, dtype) else None,
        on_progress=on_progress,
    )


def build_engine(
    model: XLoraModel,
    checkpoint: Checkpoint,
    options: EngineOptions,
    group: Group | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
    *,
    wait_for_native: bool = False,
    step_cost: StepCost | None = None,
) -> Engine:
    """An engine around a loaded model, or around rank 0's shard of it: divides the memory and connects the parts.

    Native kernels may have to be compiled first. Unless `wait_for_native`, that happens in another thread, which then
    calls `on_progress` later. `step_cost` is measured unless it is given.
    """
    keep_freed_memory()
    sizes = divide_memory(model, options, model.device, free_device_bytes(model.device))
    if group is not None:
        num_blocks = group.agree_on_blocks(sizes.num_blocks)
        sizes = replace(sizes, num_blocks=num_blocks, max_model_len=sizes.within(num_blocks))
    kv_cache = allocate_cache(model, sizes)
    runner = ModelRunner(model, kv_cache)
    if group is not None:
        runner.step = Leader(model, group)
    draft_rates = _draft_rates(model, checkpoint, options)
    if model.device.type == "cuda":
        warm_up(runner.step, kv_cache, drafts=len(draft_rates) > 1)
        if group is None and options.cuda_graphs:
            runner.step = capture_steps(runner, options.max_num_seqs, sizes.max_model_len, len(draft_rates))
    scheduler = Scheduler(
        BlockManager(sizes.num_blocks, options.block_size),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=sizes.max_rows,
        lookahead=options.lookahead,
        draft_rates=draft_rates,
        speculative_tokens=options.speculative_tokens,
        prefix_cache=options.prefix_cache,
        step_cost=step_cost,
        max_scored_rows=max(1, _MAX_SCORED_LOGITS // model.config.get_text_config().vocab_size),
        dummy_row_key=model.dummy_row.cpu().numpy().tobytes(),
    )
    info = _engine_info(model, checkpoint, options, sizes)
    grammars = Grammars(GrammarCompiler(info.tokenizer_path, info.vocab_size, info.eos_token_ids))
    if uses_native(options, model.device, model.dtype):
        cache = Path(options.native_cache).expanduser()
        native.build(model, runner.hand_over, on_progress, cache=cache, wait=wait_for_native)
    reporter = GateReporter(kv_cache, model.classifier, len(model.sites))
    engine = Engine(runner, reporter, scheduler, info, grammars, checkpoint.files)
    if step_cost is None:
        measure_steps(engine, scheduler)
    return engine


def _draft_rates(model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions) -> list[float]:
    """Expected acceptance rates of the scaling pass's drafts at depth 1, 2, ..., up to the depth that the bundle, this
    model (one token where it is divided) and the options allow. Deeper ones cost a run of the draft layer.
    """
    if checkpoint.draft_layer is None:
        return [LOOKAHEAD_RATE]
    rates: list[float] = checkpoint.draft_layer.agreement.tolist()
    uses_layer = model.draft_chain is not None and options.lookahead
    return rates[: options.draft_depth if uses_layer else 1]


def rows_to_capture(max_num_seqs: int, depth: int) -> int:
    """The rows of the largest captured step: one in both streams for every sequence, or those of `depth` drafts while
    few sequences run, and at least those that step_cost.py times: if only few rows had a graph, each row would seem too
    expensive.
    """
    return max(MANY_ROWS, 2 * max_num_seqs, min(2 * max_num_seqs * depth, _MAX_DRAFTING_ROWS))


def capture_steps(runner: ModelRunner, max_num_seqs: int, max_model_len: int, draft_depth: int) -> CapturedSteps:
    """A step that replays CUDA graphs. Those of short contexts are captured here, others when first needed."""
    steps = CapturedSteps(
        *(runner.model, runner.kv_cache, GraphCapture(runner.model.device)),
        max_rows=rows_to_capture(max_num_seqs, draft_depth),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        draft_depth=draft_depth,
    )
    steps.warm_up(idle_choices(draft_depth, runner.model.device) if draft_depth > 1 else ())
    runner.overlapped_rows = steps.row_buckets[-1]
    return steps


def uses_native(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the options ask for native kernels, and these can compute on the device in this dtype."""
    is_suited = device.type == "cpu" and dtype == torch.float32 and options.tensor_parallel == 1
    return is_suited and options.native_kernels and options.quantization is None


def bfloat16_tensors(model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions) -> list[torch.Tensor]:
    """The tensors of a model on the meta device that a CPU will store in bfloat16 under float32 arithmetic."""
    if not _can_have_native(options, torch.device("cpu"), model.dtype):
        return []
    return native.bfloat16_tensors(model, checkpoint)


def plan_for(checkpoint: Checkpoint, options: EngineOptions, gpu_bytes: int | None) -> MemoryPlan:
    """The memory plan of an engine with these options on a GPU with `gpu_bytes` free, or on this CPU (None)."""
    device = torch.device("cpu" if gpu_bytes is None else "cuda")
    return resolve_options(checkpoint, options, device, gpu_bytes, bfloat16_tensors)[1]


def _can_have_native(options: EngineOptions, device: torch.device, dtype: torch.dtype) -> bool:
    return uses_native(options, device, dtype) and native.is_available(Path(options.native_cache).expanduser())


def _engine_info(model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions, sizes: Sizes) -> EngineInfo:
    device = str(model.device)
    if model.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(model.device)})"
    if options.tensor_parallel > 1:
        device = f"{options.tensor_parallel} ranks, the first on {device}"
    return EngineInfo(
        model=checkpoint.name,
        architecture=type(model.causal_lm).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        experts=[{"name": expert.name, "description": expert.description} for expert in checkpoint.experts],
        sites=model.sites,
        xlora_config=checkpoint.xlora.to_dict(),
        dummy_row=model.dummy_row.expand(len(model.sites), -1).tolist(),
        vocab_size=model.config.get_text_config().vocab_size,
        eos_token_ids=list(checkpoint.eos_token_ids),
        max_model_len=sizes.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=sizes.max_rows,
        block_size=options.block_size,
        kv_blocks_total=sizes.num_blocks,
        kv_bytes=sizes.num_blocks * sizes.layout.block_bytes,
        weights_sha256=checkpoint.weights_sha256,
        fingerprint="" if checkpoint.files is None else checkpoint.files.fingerprint,
        versions={
            "service": __version__,
            "torch": str(torch.__version__),  # TorchVersion is no plain str
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        tokenizer_path=os.fspath(checkpoint.tokenizer_path),
        gate_profile=checkpoint.gate_profile,
        draft_head=None if checkpoint.draft_head is None else checkpoint.draft_head.size,
        draft_layer=[] if model.draft_chain is None else model.draft_chain.layer.agreement,
    )
