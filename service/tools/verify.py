"""A short parity check of a served model: generates greedily with the engine, and compares its numbers with PEFT's, or
with those of a plain computation.

Knows both sides and how to compare them; reference.py chooses the reference. The two models are in memory one after the
other, never together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.defaults import resolve_options
from service.engine.loader import bfloat16_tensors, build_engine, load_model_of
from service.engine.memory_plan import MemoryPlan
from service.engine.sizing import free_device_bytes, resolve_device, resolve_dtype
from service.model.batch import Batch, DraftStart
from service.model.draft_layer import Choose
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.tools.reference import Expected, compute_expected

PROMPT_TOKENS, NEW_TOKENS, CHUNK_ROWS = 24, 16, 10
TOLERANCE = 1e-3  # in float32
NEAR_TIE = 1e-2  # a difference of two tokens' logits at which either may win


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest absolute differences between the engine and the reference."""

    device: str
    dtype: str  # of the arithmetic
    source: str  # the reference
    note: str | None  # why the reference is not PEFT, or not PEFT alone
    tokens: int  # generated tokens
    equal_tokens: int  # those that are the reference's best as well
    other_tokens: int  # those that the reference clearly would not choose; the rest are near ties
    logits: float  # over all positions
    scalings: float  # over all positions, after softmax and top-k

    @property
    def is_judged(self) -> bool:
        """Whether differences are meaningful: in half precision, rounding depends on the order of operations."""
        return self.dtype == "float32"

    @property
    def is_exact(self) -> bool:
        """Whether the differences are within float32 rounding."""
        return self.logits <= TOLERANCE and self.scalings <= TOLERANCE and not self.other_tokens


@dataclass(frozen=True, slots=True)
class _Generated:
    """A prompt and its continuation, with the logits and scalings of all positions but the last."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor  # [T, V]
    scalings: Tensor  # [T, S, E]

    @property
    def read(self) -> list[int]:
        """The T tokens that were the model's input."""
        return self.prompt + self.tokens[:-1]


def verify(
    checkpoint: Checkpoint, options: EngineOptions, on_progress: Callable[[str], None] = lambda _: None
) -> Parity:
    """Generates a text with lookahead and chunked prefill, and compares it with the same text computed without them."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # on_progress reports instead
    device = resolve_device(options.device)
    resolved, plan = resolve_options(checkpoint, options, device, free_device_bytes(device), bfloat16_tensors)
    options = _small(resolved)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    found = _generate(checkpoint, options, on_progress)
    gc.collect()  # adapted modules form reference cycles, which would keep the engine's weights in memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    expected = compute_expected(
        checkpoint,
        found.read,
        device=device,
        dtype=dtype,
        quantization=options.quantization,
        on_progress=on_progress,
    )
    return _compare(found, expected, device, plan)


def _compare(found: _Generated, expected: Expected, device: torch.device, plan: MemoryPlan) -> Parity:
    logits = expected.logits.float().cpu()
    rows, chosen = logits[len(found.prompt) - 1 :], torch.tensor(found.tokens)
    behind = rows.amax(-1) - rows.gather(1, chosen[:, None])[:, 0]
    return Parity(
        device=str(device),
        dtype=plan.dtype,
        source=expected.source,
        note=expected.note,
        tokens=len(found.tokens),
        equal_tokens=int((rows.argmax(-1) == chosen).sum()),
        other_tokens=int((behind > NEAR_TIE).sum()),
        logits=float((found.logits - logits).abs().max()),
        scalings=float((found.scalings - expected.scalings.float().cpu()).abs().max()),
    )


def _generate(checkpoint: Checkpoint, options: EngineOptions, on_progress: Callable[[str], None]) -> _Generated:
    """Loads the model as serving does, and generates a text. Raises StartupError when that fails."""
    engine = build_engine(load_model_of(checkpoint, options, on_progress), checkpoint, options, wait_for_native=True)
    engine.runner.step = record = _Record(engine.runner.step)
    on_progress("generating")
    vocabulary = engine.info.vocab_size
    prompt = [(7919 * number + 13) % vocabulary for number in range(PROMPT_TOKENS)]
    # prompt_logprobs make the engine compute the logits of all positions
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    engine.add(Request("verify", prompt, sampling, return_scalings="full", scalings_start=0))
    tokens: list[int] = []
    rows: list[Tensor] = []
    while engine.has_work():
        for output in engine.step().outputs:
            if output.error is not None:
                raise StartupError(f"the model could not write {NEW_TOKENS} tokens: {output.error}")
            tokens += [token.id for token in output.tokens]
            if output.gate is not None and output.gate.full is not None:
                rows.append(torch.frombuffer(bytearray(output.gate.full), dtype=torch.float32))
    scalings = torch.cat(rows).view(-1, len(engine.info.sites), len(engine.info.experts))
    logits = torch.stack([record.logits[position] for position in range(len(scalings))])
    return _Generated(prompt, tokens, logits, scalings)


class _Record:
    """A Step that records logits by position. Positions after a wrong draft are computed again, and the last counts."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.logits: dict[int, Tensor] = {}  # [V] of real rows

    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Step.forward; records the logits of real rows."""
        output = self._step.forward(batch, kv_cache)
        rows = batch.logit_rows.tolist()
        for position, row, logits in zip(batch.positions[batch.logit_rows].tolist(), rows, output.logits, strict=True):
            if row >= batch.num_scaling_rows:
                self.logits[position] = logits.to("cpu", torch.float32, copy=True)
        return output

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """Step.draft."""
        return self._step.draft(start, choose, kv_cache)


def _small(options: EngineOptions) -> EngineOptions:
    """The options of a small engine in this process: for one request, with prefill in chunks."""
    return replace(
        options,
        kv_memory_bytes=None,
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK_ROWS,
        block_size=4,
        tensor_parallel=1,
    )
