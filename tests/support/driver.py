"""Runs requests through an engine until it is idle, with others joining and leaving on the way, and collects
everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.checks import checked_request
from service.contract.options import EngineOptions
from service.contract.output import FinishReason, SequenceUsage, StepOutput, TokenOutput
from service.contract.request import Request, SamplingParams
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.loader import build_engine
from service.engine.speculation.costs import StepCost
from service.model.xlora_model import XLoraModel
from service.native.step import NativeStep

if TYPE_CHECKING:  # it makes bundles with peft, which the driver itself does without
    from tests.support.tiny import Tiny, Variant

Array = NDArray[Any]
Key = tuple[str, int]  # request id, choice


@dataclass
class Choice:
    """What one choice of one request brought, pieced together from all steps."""

    token_outputs: list[TokenOutput] = field(default_factory=list)
    prompt_logprobs: list[TokenOutput] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: SequenceUsage | None = None
    start: int | None = None  # position of the first gate row
    means: list[Array] = field(default_factory=list)
    entropies: list[Array] = field(default_factory=list)
    fulls: list[Array] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token.id for token in self.token_outputs]

    @property
    def drafts(self) -> tuple[int, int]:
        """Of the scaling pass: how many were kept and how many dropped."""
        assert self.usage is not None
        return self.usage.drafts.hits, self.usage.drafts.misses

    @property
    def rows(self) -> int:
        return sum(len(mean) for mean in self.means)

    @property
    def mean(self) -> Array:
        return np.concatenate(self.means)

    @property
    def entropy(self) -> Array:
        return np.concatenate(self.entropies)

    @property
    def full(self) -> Array:
        return np.concatenate(self.fulls)


@dataclass
class Run:
    """Everything a run brought."""

    choices: dict[Key, Choice] = field(default_factory=dict)
    steps: list[StepOutput] = field(default_factory=list)

    def __getitem__(self, key: str | Key) -> Choice:
        return self.choices[(key, 0) if isinstance(key, str) else key]

    @property
    def preemptions(self) -> int:
        return sum(step.stats.preemptions for step in self.steps)


def run(
    engine: Engine,
    requests: Sequence[Request],
    *,
    joins: Mapping[int, Sequence[Request]] | None = None,
    aborts: Mapping[int, Sequence[tuple[str, int | None]]] | None = None,
    each_step: Callable[[Engine, StepOutput], None] | None = None,
    limit: int = 5000,
) -> Run:
    """Adds `requests`, steps until idle; before step i adds joins[i] and aborts aborts[i].
    Leaves an empty, checked pool.
    """
    joins, aborts = dict(joins or {}), dict(aborts or {})
    result = Run()
    for request in requests:
        engine.add(checked_request(request, engine.info))
    step = 0
    while engine.has_work() or any(number >= step for number in (*joins, *aborts)):
        for request in joins.get(step, ()):
            engine.add(checked_request(request, engine.info))
        for target in aborts.get(step, ()):
            engine.abort(*target)
        if engine.has_work():
            output = engine.step()
            result.steps.append(output)
            _collect(result, output, engine)
            engine.check_integrity()
            if each_step is not None:
                each_step(engine, output)
        step += 1
        assert step < limit, "the engine does not come to an end"
    assert engine.blocks.used == 0, "blocks are held by nobody's request"
    engine.check_integrity()
    return result


def _collect(result: Run, output: StepOutput, engine: Engine) -> None:
    for piece in output.outputs:
        choice = result.choices.setdefault((piece.request_id, piece.index), Choice())
        assert choice.finish_reason is None, "output after the end"
        choice.token_outputs += piece.tokens
        choice.prompt_logprobs += piece.prompt_logprobs
        choice.error = piece.error
        assert (piece.error is not None) == (piece.finish_reason == "error")
        if piece.gate is not None:
            gate, experts = piece.gate, len(engine.info.experts)
            if choice.start is None:
                choice.start = gate.start
            assert gate.start == choice.start + choice.rows, "gate rows with a gap or twice"
            assert gate.count > 0
            choice.means.append(np.frombuffer(gate.mean, np.float32).reshape(gate.count, experts))
            choice.entropies.append(np.frombuffer(gate.entropy, np.float32))
            assert len(choice.entropies[-1]) == gate.count
            if gate.full is not None:
                shape = (gate.count, len(engine.info.sites), experts)
                choice.fulls.append(np.frombuffer(gate.full, np.float32).reshape(shape))
        assert piece.usage is not None
        assert piece.usage.forward_passes <= len(result.steps)
        choice.finish_reason, choice.usage = piece.finish_reason, replace(piece.usage)


class Engines:
    """Engines around one model: they share its weights, each has a pool and a scheduler of its own."""

    def __init__(self, variant: Variant, dtype: torch.dtype = torch.float32) -> None:
        self.tiny: Tiny = variant.tiny
        self.checkpoint = variant.checkpoint
        self.model: XLoraModel = variant.model(dtype)
        self.news: list[str] = []  # what engines have told while and after they were made
        self._native: NativeStep | None = None

    def build(
        self, *, blocks: int | None = None, adaptive: bool = True, overlaps: bool = False, wait: bool = True,
        **options: Any,
    ) -> Engine:  # fmt: skip
        """An engine; `blocks` is the size of its pool. None is roomy for a dozen requests, and quick to check
        every step. Not `adaptive`: every possible draft is made, as if rows cost nothing. `overlaps`: the next step is
        launched before the results of one are written, as on a GPU. `wait`: for native kernels.
        """
        settings = {"max_model_len": 256, "max_num_seqs": 32, "block_size": 4, **options}
        size = 3200 // settings["block_size"] if blocks is None else blocks
        settings["kv_memory_bytes"] = size * self.model.kv_layout(settings["block_size"]).block_bytes
        shares = self._native is not None and settings.get("native_kernels", True) and "native_cache" not in settings
        if shares:
            settings["native_kernels"] = False
        chosen = EngineOptions(model=str(self.tiny.path), **settings)
        cost = StepCost.linear(0.08, 0.08) if adaptive else StepCost()
        engine = build_engine(
            self.model, self.checkpoint, chosen, None, self.news.append, wait_for_native=wait, step_cost=cost
        )
        if shares:  # a model is made native once: its weights may be kept in bfloat16 then
            engine.runner.step = self._native
        elif isinstance(engine.runner.step, NativeStep):
            self._native = engine.runner.step
        assert isinstance(engine.blocks, BlockManager)
        engine.runner.overlapped_rows = 1 << 20 if overlaps else 0
        assert blocks is None or engine.blocks.num_blocks == blocks
        return engine


def greedy(name: str, prompt: list[int], max_tokens: int = 16, **request: Any) -> Request:
    """A greedy request that only its length ends."""
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), **request)


def sampled(name: str, prompt: list[int], max_tokens: int = 16, seed: int = 1, **sampling: Any) -> Request:
    """A sampled request that only its length ends."""
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **sampling))


def words(seed: int, length: int, vocabulary: int = 320) -> list[int]:
    """`length` random token ids without the special ones."""
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
