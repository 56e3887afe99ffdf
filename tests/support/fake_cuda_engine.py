"""Engines on a fake CUDA device, and a request of every kind that makes a step do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from service.contract.checks import checked_request
from service.contract.options import EngineOptions
from service.contract.output import StepStats
from service.contract.request import GrammarSpec, Request, SamplingParams
from service.contract.steering import GateSettings, GateWeight, Steering
from service.engine.engine import Engine
from service.engine.launched_step import LaunchedStep
from service.engine.loader import build_engine
from service.engine.speculation.costs import StepCost
from service.model.attention import paged
from service.model.batch import Batch, DraftStart
from service.model.draft_layer import Choose
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from tests.support.driver import words
from tests.support.fake_cuda import FakeCuda, move_to_cuda
from tests.support.fake_cuda_device import CUDA, Counts
from tests.support.tiny import Tiny

BLOCK_SIZE = 4
_MOST_STEPS = 60
Plant = Callable[[Tensor], object]  # a defect, given the logits of a forward
_GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
_ANYTHING = GrammarSpec(regex="(?s:.*)")


@dataclass(frozen=True)
class Kind:
    """Requests of a kind, and what else their engine is told."""

    sampling: SamplingParams | None = _GREEDY
    prompt: int = 21  # tokens
    copies: int = 1  # requests
    fields: dict[str, Any] = field(default_factory=dict)  # of the request
    options: dict[str, Any] = field(default_factory=dict)  # of the engine
    blocks: int = 200  # of the pool
    before: Callable[[Engine], None] = lambda _: None
    abort_at: int | None = None  # step before which the first request is dropped
    happened: Callable[[list[StepStats]], bool] = lambda _: True  # whether the steps did what the kind is for

    def requests(self) -> list[Request]:
        """One prompt each."""
        return [Request(f"r{i}", words(i, self.prompt), self.sampling, **self.fields) for i in range(self.copies)]


def _sampling(**fields: Any) -> SamplingParams:
    return replace(_GREEDY, **fields)


def _twice(engine: Engine) -> None:
    """Leaves the prompt of the first request in the prefix cache."""
    engine.add(Request("earlier", words(0, 21), _GREEDY))
    while engine.has_work():
        engine.step()


def _drafted_ahead(stats: list[StepStats]) -> bool:
    return any(len(each.drafts.lookahead_kept + each.drafts.lookahead_dropped) > 3 for each in stats)


KINDS: dict[str, Kind] = {
    "greedy": Kind(),
    "chunked prefill": Kind(prompt=60, options={"max_num_batched_tokens": 16}),
    "several": Kind(copies=6),
    "sampled": Kind(_sampling(temperature=0.8)),
    "filtered": Kind(_sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.05), copies=2),
    "penalties": Kind(
        _sampling(repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.1), copies=2
    ),
    "logit bias": Kind(_sampling(logit_bias={7: 1.0, 9: -1.0}), copies=2),
    "min tokens": Kind(_sampling(min_tokens=3, ignore_eos=False), copies=2),
    "grammar": Kind(_sampling(form=_ANYTHING), copies=2),
    "logprobs": Kind(_sampling(logprobs=3), copies=2),
    "prompt logprobs": Kind(_sampling(prompt_logprobs=2), copies=2),
    "score": Kind(SamplingParams(max_tokens=0, prompt_logprobs=1), fields={"score_from": 4}, copies=2),
    "steered": Kind(fields={"steering": Steering(only=(0, 2), temperature=0.7, top_k=1)}, copies=2),
    "fixed gate": Kind(fields={"steering": Steering(weights=(GateWeight(1, 0.5),))}, copies=2),
    "frozen": Kind(fields={"freeze_after": 2}, copies=2),
    "other gate settings": Kind(before=lambda engine: engine.set_gate(GateSettings(0.25, 2, 0.7)), copies=2),
    "scalings log": Kind(before=lambda engine: engine.log_scalings(True), copies=2),
    "mean scalings": Kind(fields={"return_scalings": "mean", "scalings_start": 0}, copies=2),
    "full scalings": Kind(fields={"return_scalings": "full", "scalings_start": 0}, copies=2),
    "scaling pass alone": Kind(None, fields={"return_scalings": "full", "scalings_start": 0}, copies=2),
    "prefix hit": Kind(
        before=_twice,
        fields={"return_scalings": "mean", "scalings_start": 0},
        happened=lambda stats: sum(each.scaling_rows for each in stats) < 21,
    ),
    "preemption": Kind(
        _sampling(max_tokens=16, seed=1), copies=2, blocks=26, options={"prefix_cache": False},
        happened=lambda stats: any(each.preemptions for each in stats),
    ),
    "n = 4": Kind(_sampling(n=4, temperature=1.0)),
    "drafts": Kind(
        _sampling(max_tokens=16), copies=2, happened=lambda stats: any(each.drafts.accepted for each in stats)
    ),
    "drafts ahead": Kind(
        _sampling(max_tokens=12), copies=2, options={"draft_depth": 4, "speculative_tokens": 0}, happened=_drafted_ahead
    ),
    "drawn ahead": Kind(
        _sampling(max_tokens=12, temperature=0.8), copies=2, options={"draft_depth": 4, "speculative_tokens": 0},
        happened=_drafted_ahead,
    ),
    "sampled ahead": Kind(
        _sampling(max_tokens=12, temperature=0.8, frequency_penalty=0.5), copies=2,
        options={"draft_depth": 4, "speculative_tokens": 0}, happened=_drafted_ahead,
    ),
    "no lookahead": Kind(options={"lookahead": False}, copies=2),
    "abort": Kind(_sampling(max_tokens=16), copies=3, abort_at=3, options={"speculative_tokens": 0}),
    "everything": Kind(
        _sampling(
            temperature=0.8, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={7: 1.0},
            min_tokens=2, form=_ANYTHING, logprobs=2, prompt_logprobs=1,
        ),
        fields={"steering": Steering(only=(0, 2)), "return_scalings": "full", "scalings_start": 0},
        before=lambda engine: (engine.set_gate(GateSettings(0.25, 2, 0.7)), engine.log_scalings(True))[0],
        copies=3,
        options={"speculative_tokens": 0},  # or a step has more rows than are captured
    ),
}  # fmt: skip


class _Decoder:
    """A step whose launches are the decoder's; what is planted runs after it, as a part of the rest."""

    def __init__(self, step: Step, cuda: FakeCuda, plant: Plant | None) -> None:
        self._step, self._cuda, self._plant = step, cuda, plant

    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        with self._cuda.decoder():
            output = self._step.forward(batch, kv_cache)
        if self._plant is not None:
            self._plant(output.logits)
        return output

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        with self._cuda.decoder():
            return self._step.draft(start, choose, kv_cache)


class FakeCudaEngines:
    """Engines of one tiny bundle whose model has been moved to a fake device. For use inside `FakeCuda`."""

    def __init__(self, tiny: Tiny, cuda: FakeCuda, dtype: torch.dtype = torch.bfloat16) -> None:
        self._cuda, self._path = cuda, str(tiny.path)
        variant = tiny.as_stored()
        self._checkpoint = variant.checkpoint
        self.model = variant.model(dtype)  # made before the device is entered: its numbers are real
        self.model.device = CUDA

    def move(self) -> None:
        """Moves the model to the device."""
        move_to_cuda(self._cuda, self.model)

    def build(self, kind: Kind, *, cuda_graphs: bool) -> Engine:
        """An engine for requests of a kind."""
        settings = {
            "max_model_len": 128, "max_num_seqs": 4, "block_size": BLOCK_SIZE, "cuda_graphs": cuda_graphs,
            "draft_depth": 1,
            "kv_memory_bytes": kind.blocks * self.model.kv_layout(BLOCK_SIZE).block_bytes, **kind.options,
        }  # fmt: skip
        if kind.blocks < 100:
            settings["max_model_len"] = kind.blocks // 2 * BLOCK_SIZE
        options = EngineOptions(model=self._path, device="cuda", **settings)
        engine = build_engine(self.model, self._checkpoint, options, step_cost=StepCost.linear(0.007, 0.02))
        engine.runner.overlapped_rows = 1 << 20  # also eager steps are launched before results are written
        kind.before(engine)
        return engine

    def decoder(self, step: Step, plant: Plant | None = None) -> Step:
        """The step with its launches counted as the decoder's, where asked with a defect behind it."""
        return _Decoder(step, self._cuda, plant)

    def steps(self, kind: Kind, *, cuda_graphs: bool = False, plant: Plant | None = None) -> list[Counts]:
        """Runs the requests of a kind to their end, where asked with a defect in every forward. Returns what happened
        from each launch of a step to the next one. Raises AssertionError where a request fails, or the kind's purpose
        was missed.
        """
        engine = self.build(kind, cuda_graphs=cuda_graphs)
        engine.runner.step = self.decoder(engine.runner.step, plant)
        counted: list[Counts] = []
        launch = engine.runner.launch

        def counted_launch(*args: Any, **kwargs: Any) -> LaunchedStep:
            self._cuda.counts = Counts()
            counted.append(self._cuda.counts)
            return launch(*args, **kwargs)

        with patch.object(engine.runner, "launch", counted_launch):
            self._run(engine, kind)
        return counted

    def _run(self, engine: Engine, kind: Kind) -> None:
        for request in kind.requests():
            engine.add(checked_request(request, engine.info))
        stats: list[StepStats] = []
        while engine.has_work():
            if len(stats) == kind.abort_at:
                engine.abort("r0")
            output = engine.step()
            stats.append(output.stats)
            assert len(stats) < _MOST_STEPS, "the engine does not come to an end"
            for one in output.outputs:
                assert one.error is None, one.error
        assert kind.happened(stats), "the requests did not bring about what they are for"
        engine.check_integrity()
        assert engine.blocks.used == 0


@contextmanager
def attention(backend: paged.Backend) -> Iterator[None]:
    """Attention on CUDA by this backend."""
    with patch.object(paged, "cuda_backend", lambda *_: backend):
        yield
