"""The engine: schedule, launch, collect, write. Token ids in, token ids and gate rows out; no text, HTTP or threads.

    a CPU    schedule launch collect write                        schedule launch collect write
    a GPU                    collect schedule launch write        collect schedule launch write
                                              |  the device computes  |

Between two steps of a GPU stands what decides about the next one: which tokens are accepted, who has ended, who runs.
What the host has to say about a step (outputs, statistics, the log) is written while the device computes the next.
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
_COMPILING_SECONDS = 0.05  # a step with nothing else to do waits so long for a grammar


@dataclass(slots=True)
class Flight:
    """A step that the device has been given."""

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
        self._gate = CHECKPOINT_GATE  # of requests to come
        self._top_k: int | None = None  # of requests to come that do not say; None = the checkpoint's
        self._sequences: dict[str, list[Sequence]] = {}  # by request id; finished choices are gone
        self._flight: Flight | None = None
        self._planned: Plan | None = None  # scheduled, and not launched yet
        self._grammars = grammars
        self._compiling: dict[str, Future[Grammar]] = {}  # by request id: those that are not queued before it is done

    @property
    def blocks(self) -> BlockManager:
        """The KV pool's accounts."""
        return self._scheduler.blocks

    def add(self, request: Request) -> None:
        """Queues a request that `checked_request` has let through. Raises ValueError for an id that is in use."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id!r} is in use")
        if self._top_k is not None:
            request = with_top_k(request, self._top_k)
        form = None if request.sampling is None else request.sampling.form
        compiling = None if form is None else self._grammars.find(form)
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
        """Drops a request, or one of its choices, and frees what it held. Unknown ids may have ended: ignored."""
        for sequence in list(self._sequences.get(request_id, ())):
            if index is None or sequence.index == index:
                self._reporter.drop(sequence)
                self._drop(sequence)

    def set_gate(self, settings: GateSettings) -> None:
        """The gate of the requests that are added from now on; the settings have been checked. Others keep theirs."""
        stored = stored_settings(self.info.xlora_config)
        weight = weight_ratio(settings, stored)
        self._gate = AdmittedGate(self.runner.dummy_row(settings, weight), weight)
        self._top_k = settings.top_k_lora or len(self.info.experts)
        if settings.top_k_lora == stored.top_k_lora:
            self._top_k = None

    def log_scalings(self, enabled: bool) -> None:
        """Whether steps report what the classifier says, for the scalings log."""
        if enabled == self._reporter.logs_scalings:
            return
        self._reporter.logs_scalings = enabled
        for sequence in (one for choices in self._sequences.values() for one in choices):
            sequence.unlogged.clear()  # what was computed meanwhile is not in it

    def identify(self, on_known: Callable[[str], None]) -> None:
        """Calls `on_known` with the hash over all weight files, later and from another thread."""
        if self._weight_files is not None:
            self._weight_files.identify(on_known)

    def has_work(self) -> bool:
        """Whether step() has anything to do."""
        return self._flight is not None or self._scheduler.has_work() or bool(self._compiling)

    def wait(self) -> None:
        """Returns once the device is done with the step that it was given, if any: what is added or aborted before
        step() is called counts for the next one.
        """
        if self._flight is not None:
            self._flight.launched.copies.wait()

    def step(self) -> StepOutput:
        """Advances every scheduled sequence by one forward pass.

        Where the device computes beside the host and a launch takes no time, the forward pass was launched by the call
        before, and this one launches the next.
        """
        ended = self._queue_compiled() if self._compiling else []
        if self._flight is None:
            ended += self._launch(self._next_plan())
        flight, self._flight = self._flight, None
        if flight is None:
            return self._write(ended)
        results, readings = self._collect(flight)
        seconds = time.perf_counter() - flight.started
        if self.runner.overlapped_rows:
            plan = self._next_plan()
            if plan is None or plan.rows <= self.runner.overlapped_rows:
                ended += self._launch(plan)
            else:
                self._planned = plan  # its launch would take long: the results go first
        return self._write(ended, flight, results, readings, seconds)

    def report(self) -> StepOutput:
        """The load as it is, without a step: what there is to say after an abort has left nothing to do."""
        return self._write([])

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every KV block is accounted for."""
        self._scheduler.check_integrity()

    def _queue(self, request_id: str, grammar: Grammar | None = None) -> None:
        for sequence in self._sequences[request_id]:
            sequence.grammar = None if grammar is None else grammar.start()
            self._scheduler.add(sequence)

    def _queue_compiled(self) -> list[SequenceOutput]:
        """Queues the requests whose grammar is there; returns the end of those for which there is none. Waits a little
        if there is nothing else to do.
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
        siblings = self._sequences[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[request_id]
            self._compiling.pop(request_id, None)

    def _next_plan(self) -> Plan | None:
        """What to run next, if there is anything: what has been planned already, without whom was dropped since."""
        plan, self._planned = self._planned, None
        if plan is not None:
            plan.scheduled = [one for one in plan.scheduled if not one.sequence.dropped]
            if plan.scheduled:
                return plan
        return self._scheduler.schedule() if self._scheduler.has_work() else None

    def _launch(self, plan: Plan | None) -> list[SequenceOutput]:
        """Gives the device the next step, if there is one. Returns the end of what was too large for it."""
        if plan is None:
            return []
        started = time.perf_counter()
        try:
            launched = self.runner.launch(plan.scheduled, keep_gate_logits=self._reporter.logs_scalings)
            readings = self._reporter.launch(launched)
            launched.copies.close()
        except OutOfMemory as error:
            logger.error("out of memory: %s", error)
            return [self._shed(plan)]
        self._flight = Flight(plan, launched, readings, started)
        return []

    def _collect(self, flight: Flight) -> tuple[list[SequenceResult], list[GateReading]]:
        """Waits for the sampled ids; verifies drafts and accepts tokens, ends what has ended. What the next step
        depends on happens here, and nothing else.
        """
        results = [one for one in self.runner.collect(flight.launched) if not one.scheduled.sequence.dropped]
        for result in results:
            self._advance(result)
        ended = [result.scheduled.sequence for result in results if result.finish_reason is not None]
        readings = self._reporter.settle(flight.readings, ended)
        for result in results:
            if result.finish_reason != "error":
                self._scheduler.commit(result.scheduled.sequence)
        for sequence in ended:
            self._drop(sequence)
        return results, readings

    def _write(
        self,
        ended: list[SequenceOutput],
        flight: Flight | None = None,
        results: SequenceOf[SequenceResult] = (),
        readings: SequenceOf[GateReading] = (),
        seconds: float = 0.0,
    ) -> StepOutput:
        """What there is to say of a step that has been collected, if any, and of the load. `ended` ended besides it, or
        since: the last to be heard of a sequence is its end.
        """
        stats = StepStats(step_seconds=seconds)
        rows = self._reporter.report(readings, stats)
        outputs: list[SequenceOutput] = []
        if flight is not None:
            stats.preemptions = flight.plan.preemptions
            stats.scaling_rows = sum(one.scaling_count for one in flight.plan.scheduled)
            stats.real_rows = sum(one.real_count for one in flight.plan.scheduled)
            self._reporter.log(flight.launched, results)
            logprobs, scores = flight.launched.read_logprobs(), flight.launched.read_scores()
            for result in results:
                output = output_of(result, logprobs, scores)
                output.gate = rows.get(id(result.scheduled.sequence))
                count_step(result.scheduled, stats)
                if output.tokens or output.gate or output.prompt_logprobs or output.finish_reason is not None:
                    outputs.append(output)
        outputs += ended
        self._reporter.flush(stats, everything=flight is None or any(one.finish_reason is not None for one in outputs))
        stats.requests_running, stats.requests_waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        stats.kv_blocks_used, stats.kv_blocks_total = self.blocks.used, self.blocks.num_blocks
        return StepOutput(outputs, stats)

    def _shed(self, plan: Plan) -> SequenceOutput:
        """Ends the sequence that had most rows in a step that was too large (the latest of several), for the others'
        sake. They run the same rows again.
        """
        self.runner.free_memory()
        _, number = max((one.rows, number) for number, one in enumerate(plan.scheduled))
        sequence = plan.scheduled[number].sequence
        self._reporter.drop(sequence)
        self._drop(sequence)
        return failed(sequence, Failure("the server is out of memory"))

    def _advance(self, result: SequenceResult) -> None:
        """Takes one sequence on by what its rows have brought. What it raises ends the sequence."""
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
            if not isinstance(raised, InvalidRequestError):  # as of a grammar, which is the caller's
                logger.exception("request %s failed", sequence.request.id)
            result.error = Failure.of(raised, "the engine failed on this request")
        if result.error is not None:
            result.finish_reason = "error"
        result.final = sequence.final

    def _accept(self, result: SequenceResult) -> None:
        """Moves the streams on and verifies drafts; leaves the accepted tokens, and the end, in the result."""
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
        elif result.predictions and sequence.scaling.computed == scheduled.scaling_end:  # made after right tokens
            sequence.predict(scheduled.predict_start, result.predictions, scheduled.expected, result.deeper)

    def _verify(self, result: SequenceResult) -> None:
        """Accepts sampled tokens in order, as long as the rows they come from were run on the right tokens."""
        sequence = result.scheduled.sequence
        if not sequence.generates or sequence.scores_only:
            result.tokens = []
            if sequence.all_given_done:
                result.finish_reason = "length"
            return
        for count, token in enumerate(result.tokens, start=1):
            drafted = sequence.accept(token)
            result.finish_reason = sequence.reason_to_end(token)
            if result.finish_reason is not None or not drafted:
                del result.tokens[count:]
                return
