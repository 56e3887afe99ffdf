"""The engine: schedule, launch, collect, write. Token ids in, token ids and gate rows out; no text, HTTP or threads.

    synchronous     schedule launch collect write                 schedule launch collect write
    asynchronous             collect schedule launch write        collect schedule launch write
                                                     |  the device computes  |

Steps are asynchronous where launching one takes no time: those that fit a captured CUDA graph
(`ModelRunner.overlapped_rows`). Between two of these, the host does only what the next one depends on: it accepts
tokens, ends sequences and schedules. Outputs, statistics and log are written while the device runs the next step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from service.checkpoint.weights.weight_files import WeightFiles
from service.contract.checks import stored_settings
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.output import Failure, SequenceOutput, StepOutput, StepStats
from service.contract.request import Request
from service.contract.steering import GateSettings
from service.engine.block_manager import BlockManager
from service.engine.gate.report import GateReading, GateReporter
from service.engine.gate.settings import CHECKPOINT_GATE, AdmittedGate, weight_ratio, with_top_k
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.model_runner import ModelRunner
from service.engine.out_of_memory import OutOfMemory
from service.engine.outputs import count_step, failed, output_of
from service.engine.plan import Plan
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.grammar import Grammar, Grammars

logger = logging.getLogger(__name__)

_NOT_FINITE = Failure(
    "the model computed numbers that are not finite (NaN or infinity) for this request: they overflow its dtype; "
    "use smaller experts.weights, or start the server with --dtype bfloat16 or float32"
)
_COMPILING_SECONDS = 0.05  # how long a step with nothing else to do waits for a grammar


@dataclass(slots=True)
class StepInFlight:
    """A launched step that has not been collected yet, with its plan, its gate readings and its start time."""

    plan: Plan
    launched: LaunchedStep
    readings: list[GateReading]
    started: float  # perf_counter seconds


class Engine:
    """Serves any number of requests over one model. Single-threaded: call add, abort and step from one place."""

    def __init__(
        self,
        runner: ModelRunner,
        reporter: GateReporter,
        scheduler: Scheduler,
        info: EngineInfo,
        grammars: Grammars,
        weight_files: WeightFiles | None = None,
    ) -> None:
        self.info = info
        self._weight_files = weight_files
        self.runner = runner
        self._reporter = reporter
        self._scheduler = scheduler
        self._gate = CHECKPOINT_GATE  # of requests that are added from now on
        self._top_k: int | None = None  # of those that set none themselves; None = the checkpoint's
        self._sequences: dict[str, list[Sequence]] = {}  # by request id; finished choices are gone
        self._in_flight: StepInFlight | None = None
        self._planned: Plan | None = None  # scheduled, and not launched yet
        self._grammars = grammars
        self._compiling: dict[str, Future[Grammar]] = {}  # by request id, of requests that wait for their grammar

    @property
    def blocks(self) -> BlockManager:
        """The block manager of the KV pool."""
        return self._scheduler.blocks

    def add(self, request: Request) -> None:
        """Queues a request that has passed `checked_request`. Raises ValueError for an id that is in use."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id!r} is in use")
        if self._top_k is not None:
            request = with_top_k(request, self._top_k)
        spec = None if request.sampling is None else request.sampling.form
        compiling = None if spec is None else self._grammars.find(spec)
        now = time.monotonic()
        self._sequences[request.id] = [
            Sequence.of(request, index, now, self._gate, self.info.eos_token_ids)
            for index in range(request.num_choices)
        ]
        if compiling is None:
            self._queue(request.id)
        else:
            self._compiling[request.id] = compiling

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices, and releases its blocks. Ignores unknown ids: they may have ended."""
        for sequence in list(self._sequences.get(request_id, ())):
            if index is None or sequence.index == index:
                self._reporter.drop(sequence)
                self._drop(sequence)

    def set_gate(self, settings: GateSettings) -> None:
        """Sets the gate of requests that are added from now on; earlier ones keep theirs. The settings are valid."""
        stored = stored_settings(self.info.xlora_config)
        weight = weight_ratio(settings, stored)
        self._gate = AdmittedGate(self.runner.dummy_row(settings, weight), weight)
        self._top_k = settings.top_k_lora or len(self.info.experts)
        if settings.top_k_lora == stored.top_k_lora:
            self._top_k = None

    def log_scalings(self, enabled: bool) -> None:
        """Switches on or off that steps report the classifier's weights, for the scalings log."""
        if enabled == self._reporter.logs_scalings:
            return
        self._reporter.logs_scalings = enabled
        for sequence in (one for choices in self._sequences.values() for one in choices):
            sequence.unlogged.clear()  # rows that were buffered before a pause are not logged after it

    def hash_weights(self, on_known: Callable[[str], None]) -> None:
        """Calls `on_known` with the hash over all weight files, later and from another thread."""
        if self._weight_files is not None:
            self._weight_files.hash_weights(on_known)

    def has_work(self) -> bool:
        """Whether step() has anything to do."""
        return self._in_flight is not None or self._scheduler.has_work() or bool(self._compiling)

    def wait(self) -> None:
        """Waits until the device has finished the step in flight, if any. Requests that are added or aborted between
        this call and step() are considered for the next launch.
        """
        if self._in_flight is not None:
            self._in_flight.launched.copies.wait()

    def step(self) -> StepOutput:
        """Advances every scheduled sequence by one forward pass.

        Where steps are asynchronous, this call collects the forward pass that the call before has launched, and
        launches the next one before it writes the outputs.
        """
        ended = self._queue_compiled() if self._compiling else []
        if self._in_flight is None:
            ended += self._launch(self._next_plan())
        step, self._in_flight = self._in_flight, None
        if step is None:
            return self._write(ended)
        results, readings = self._collect(step)
        seconds = time.perf_counter() - step.started
        if self.runner.overlapped_rows:
            plan = self._next_plan()
            if plan is None or plan.rows <= self.runner.overlapped_rows:
                ended += self._launch(plan)
            else:
                self._planned = plan  # a launch this large blocks for long: write the results first
        return self._write(ended, step, results, readings, seconds)

    def report(self) -> StepOutput:
        """Statistics without a step, for when an abort has left nothing to run."""
        return self._write([])

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every KV block is accounted for."""
        self._scheduler.check_integrity()

    def _queue(self, request_id: str, grammar: Grammar | None = None) -> None:
        for sequence in self._sequences[request_id]:
            sequence.grammar = None if grammar is None else grammar.start()
            self._scheduler.add(sequence)

    def _queue_compiled(self) -> list[SequenceOutput]:
        """Queues the requests whose grammar is compiled; returns the outputs of those for which compiling failed. Waits
        a little if there is nothing else to do.
        """
        if not self._scheduler.has_work():
            wait(self._compiling.values(), _COMPILING_SECONDS, FIRST_COMPLETED)
        refused: list[SequenceOutput] = []
        for request_id, future in [item for item in self._compiling.items() if item[1].done()]:
            error = future.exception()
            if error is None:
                del self._compiling[request_id]
                self._queue(request_id, future.result())
                continue
            failure = Failure.of(error, "compiling failed") if isinstance(error, Exception) else Failure(str(error))
            for sequence in list(self._sequences[request_id]):
                self._drop(sequence)
                refused.append(failed(sequence, failure))
        return refused

    def _drop(self, sequence: Sequence) -> None:
        request_id = sequence.request.id
        if request_id not in self._compiling:
            self._scheduler.remove(sequence)
        sequence.dropped = True
        choices = self._sequences[request_id]
        choices.remove(sequence)
        if not choices:
            del self._sequences[request_id]
            self._compiling.pop(request_id, None)

    def _next_plan(self) -> Plan | None:
        """The deferred plan, without sequences that were dropped since, or else a new one; None with nothing to run."""
        plan, self._planned = self._planned, None
        if plan is not None:
            plan.scheduled = [one for one in plan.scheduled if not one.sequence.dropped]
            if plan.scheduled:
                return plan
        return self._scheduler.schedule() if self._scheduler.has_work() else None

    def _launch(self, plan: Plan | None) -> list[SequenceOutput]:
        """Launches a plan, if there is one. When memory runs out, returns the output of the sequence that it ends."""
        if plan is None:
            return []
        started = time.perf_counter()
        try:
            launched = self.runner.launch(plan.scheduled, keep_gate_logits=self._reporter.logs_scalings)
            readings = self._reporter.launch(launched)
            launched.copies.close()
        except OutOfMemory as error:
            logger.error("out of memory: %s", error)
            return [self._end_largest(plan)]
        self._in_flight = StepInFlight(plan, launched, readings, started)
        return []

    def _collect(self, step: StepInFlight) -> tuple[list[SequenceResult], list[GateReading]]:
        """Waits for the sampled ids, verifies drafts, accepts tokens, and drops sequences that have ended. Does only
        the work that the next step depends on.
        """
        results = [one for one in self.runner.collect(step.launched) if not one.scheduled.sequence.dropped]
        for result in results:
            self._advance(result)
        ended = [result.scheduled.sequence for result in results if result.finish_reason is not None]
        readings = self._reporter.keep_final(step.readings, ended)
        for result in results:
            if result.finish_reason != "error":
                self._scheduler.commit(result.scheduled.sequence)
        for sequence in ended:
            self._drop(sequence)
        return results, readings

    def _write(
        self,
        ended: list[SequenceOutput],
        step: StepInFlight | None = None,
        results: SequenceOf[SequenceResult] = (),
        readings: SequenceOf[GateReading] = (),
        seconds: float = 0.0,
    ) -> StepOutput:
        """The outputs and statistics of a collected step, if any, and the current load. `ended` are outputs of
        sequences that ended outside of the step, or after it, and therefore come last.
        """
        stats = StepStats(step_seconds=seconds)
        rows = self._reporter.report(readings, stats)
        outputs: list[SequenceOutput] = []
        if step is not None:
            stats.preemptions = step.plan.preemptions
            stats.scaling_rows = sum(one.scaling_count for one in step.plan.scheduled)
            stats.real_rows = sum(one.real_count for one in step.plan.scheduled)
            self._reporter.log(step.launched, results)
            logprobs, scores = step.launched.read_logprobs(), step.launched.read_scores()
            for result in results:
                output = output_of(result, logprobs, scores)
                output.gate = rows.get(id(result.scheduled.sequence))
                count_step(result.scheduled, stats)
                if output.tokens or output.gate or output.prompt_logprobs or output.finish_reason is not None:
                    outputs.append(output)
        outputs += ended
        self._reporter.flush(stats, everything=step is None or any(one.finish_reason is not None for one in outputs))
        stats.requests_running, stats.requests_waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        stats.kv_blocks_used, stats.kv_blocks_total = self.blocks.used, self.blocks.num_blocks
        return StepOutput(outputs, stats)

    def _end_largest(self, plan: Plan) -> SequenceOutput:
        """Ends the sequence with the most rows (the last of equals) in a step that ran out of memory. The others are
        scheduled with the same rows again.
        """
        self.runner.free_memory()
        _, number = max((one.rows, number) for number, one in enumerate(plan.scheduled))
        sequence = plan.scheduled[number].sequence
        self._reporter.drop(sequence)
        self._drop(sequence)
        return failed(sequence, Failure("the server is out of memory"))

    def _advance(self, result: SequenceResult) -> None:
        """Applies one result to its sequence. An exception ends that sequence alone."""
        sequence = result.scheduled.sequence
        try:
            if result.error is None and not result.finite:
                if sequence.retry_without_drafts(result.scheduled.scaling_end, result.scheduled.real_end):
                    result.tokens = []
                    return
                self._scheduler.forget(sequence)
                result.error = _NOT_FINITE
            if result.error is None:
                self._accept(result)
        except Exception as raised:
            if not isinstance(raised, InvalidRequestError):  # raised by a grammar that became too complex
                logger.exception("request %s failed", sequence.request.id)
            result.error = Failure.of(raised, "the engine failed on this request")
        if result.error is not None:
            result.finish_reason = "error"
        result.final = sequence.final

    def _accept(self, result: SequenceResult) -> None:
        """Advances both streams and verifies drafts. Leaves accepted tokens and finish reason in the result."""
        scheduled = result.scheduled
        sequence = scheduled.sequence
        if not sequence.started:
            sequence.started = True
            sequence.usage.queue_seconds = time.monotonic() - sequence.arrival_time
        sequence.scaling.computed = scheduled.scaling_end
        sequence.real.computed = scheduled.real_end
        if scheduled.scores:
            sequence.scored = scheduled.scores.stop
        self._verify(result)
        if result.finish_reason is not None:
            sequence.give_up_drafts()
        elif (
            result.predictions and sequence.scaling.computed == scheduled.scaling_end
        ):  # no draft before them was wrong
            sequence.predict(scheduled.predict_start, result.predictions, scheduled.expected, result.deeper)

    def _verify(self, result: SequenceResult) -> None:
        """Accepts sampled tokens in order, up to and including the first that contradicts its draft."""
        sequence = result.scheduled.sequence
        if not sequence.generates or sequence.scores_only:
            result.tokens = []
            if sequence.is_fully_computed:
                result.finish_reason = "length"
            return
        for count, token in enumerate(result.tokens, start=1):
            drafted = sequence.accept(token)
            result.finish_reason = sequence.finish_reason(token)
            if result.finish_reason is not None or not drafted:
                del result.tokens[count:]
                return
