"""Time the host takes in front of each launch, on an engine whose device costs a given time a step and nothing else.

    python -m benchmarks.host [--sequences 1 32 128] [--device-ms 5] [--tokens 64]

    in front    milliseconds from the arrival of a step's ids to the launch of the next: the device idles
    beside      milliseconds of the rest, sampling and outputs, while the device computes; what does not fit delays it
    share       of the steps that the device alone would make in the same time

The engine is the real one, with its scheduler, batches, sampling, statistics and outputs; its step is a stub that
returns at once, and whose ids arrive after the device's time. All requests decode, sampled at temperature 1 with drafts
of the scaling pass that agree four times in five at every depth the bundle has. The engine's process has a core to
itself and the machine should be idle: milliseconds are what is measured. Grammar masks are stated apart, since they are
the caller's wish and computed by another library.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common import DEMO, Bar, emit, make_engine, print_row, prompt_tokens, use_threads
from service.contract.request import GrammarSpec, Request, SamplingParams
from service.engine.engine import Engine
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.model_runner import ModelRunner
from service.engine.speculation.costs import StepCost
from service.model.batch import Batch, DraftStart
from service.model.draft_layer import Choose, draft_tokens
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput

_BARS = {1: 0.97, 32: 0.90, 128: 0.76}
_PROMPT = 64
_VOCABULARY = 128
_DIFFERENCE = 0.3  # drafts agree about four times in five
_FORM = GrammarSpec(regex="[a-z ]{4000}")


class NoStep:
    """A forward that costs next to nothing. Every real row has the same logits, and so has every scaling row: noise
    alone tells tokens apart, and drafts agree as often as noise outweighs the difference. There are few ids: what a
    row of a vocabulary costs is the device's business, the operators that are called for it are the host's.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(_VOCABULARY, generator=generator)
        self._logits = torch.stack([logits, logits + _DIFFERENCE * torch.randn(_VOCABULARY, generator=generator)])
        self._gate = torch.rand(4096, *kv_cache.gate_rows.shape[1:])

    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Logits by the kind of row, some gate logits, no hidden states."""
        gate = self._gate[: batch.num_scaling_rows]
        hidden = torch.empty(batch.fields.shape[1], 0)
        return ForwardOutput(self._logits[batch.is_scaling[batch.logit_rows]], gate, gate, hidden)

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> torch.Tensor:
        """Drafts of the scaling rows' logits at every depth."""
        return draft_tokens(
            start, choose, lambda state, *_: state, lambda state: self._logits[1].expand(len(state), -1)
        )


@dataclass
class Clock:
    """What was seen of some steps, in seconds."""

    in_front: list[float] = field(default_factory=list)
    cpu_in_front: list[float] = field(default_factory=list)  # the same without what others did on this core
    beside: list[float] = field(default_factory=list)


class DelayedRunner(ModelRunner):
    """Ids arrive `device_seconds` after their step was launched."""

    def __init__(self, runner: ModelRunner, step: Any, device_seconds: float) -> None:
        self.__dict__.update(runner.__dict__)
        self.step = step
        self.overlapped_rows = 1 << 20
        self._device_seconds = device_seconds
        self._cpu = 0.0
        self._arrived = self._done = 0.0  # when the ids of the last step did, and when the device is done with the next
        self._forward = step.forward
        self.clock = Clock()
        step.forward = self._launched

    def _launched(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        now = time.perf_counter()
        self.clock.in_front.append(now - self._arrived)
        self.clock.cpu_in_front.append(time.thread_time() - self._cpu)
        self._done = now + self._device_seconds
        output: ForwardOutput = self._forward(batch, kv_cache)
        return output

    def collect(self, launched: LaunchedStep) -> list[SequenceResult]:
        """Waits as for a device; the clock of the host's next work starts when it would be there."""
        now = time.perf_counter()
        self.clock.beside.append(now - (self._done - self._device_seconds))
        while time.perf_counter() < self._done:
            pass
        self._arrived = max(now, self._done)
        self._cpu = time.thread_time()
        return super().collect(launched)


def measured(engine: Engine, count: int, tokens: int, form: GrammarSpec | None = None) -> dict[str, Any]:
    """All requests decode; the steps in which any is at its prompt, or has ended, do not count."""
    runner: Any = engine.runner
    prompt = prompt_tokens(DEMO, _PROMPT)
    params = SamplingParams(max_tokens=4 * tokens, seed=1, ignore_eos=True, form=form)
    for number in range(count):
        engine.add(Request(str(number), [16 + number % 100, *prompt], params))
    written = 0
    while written < 8 * count:  # all are past their prompts
        written += sum(len(output.tokens) for output in engine.step().outputs)
    runner.clock = clock = Clock()
    started, steps, hits, misses = time.perf_counter(), 0, 0, 0
    while written < (8 + tokens) * count:
        output = engine.step()
        written += sum(len(one.tokens) for one in output.outputs)
        hits, misses = hits + output.stats.drafts.hits, misses + output.stats.drafts.misses
        steps += 1
    seconds = time.perf_counter() - started
    for number in range(count):
        engine.abort(str(number))
    while engine.has_work():
        engine.step()
    return {
        "sequences": count,
        "steps": steps,
        "in front ms": 1000 * statistics.median(clock.in_front),
        "of this process": 1000 * statistics.median(clock.cpu_in_front),
        "beside ms": 1000 * statistics.median(clock.beside),
        "agree": hits / max(1, hits + misses),
        "share": steps * runner._device_seconds / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--device-ms", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    use_threads(1)
    engine = make_engine(DEMO, max_num_seqs=128, native_kernels=False, prefix_cache=True, speculative_tokens=8)
    engine._scheduler.drafts.cost = StepCost.linear(0.007, 0.02)  # as on a GPU
    engine.runner = DelayedRunner(engine.runner, NoStep(engine.runner.kv_cache), args.device_ms / 1000)
    gc.collect()
    gc.freeze()  # as the engine's process does
    rows, bars = [], []
    for form in (None, _FORM):
        for count in args.sequences:
            row = {"grammar": form is not None, **measured(engine, count, args.tokens, form)}
            rows.append(row)
            print_row(row)
            if form is None and count in _BARS and args.device_ms == 5.0:
                what = f"share of the device's own limit, {count} sequences"
                bars.append(Bar(what, ">=", _BARS[count], row["share"]))
    emit({"benchmark": "host", "rows": rows}, bars)


if __name__ == "__main__":
    main()
