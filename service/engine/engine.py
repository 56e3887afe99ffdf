"""The engine: schedule, run, postprocess. Token ids in, token ids and gate rows out; no text, no HTTP, no threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress

from service.checkpoint.weights.weight_files import WeightFiles
from service.contract.checks import stored_settings
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.output import Failure, FinishReason, SequenceOutput, StepOutput, StepStats, TokenOutput
from service.contract.request import Request
from service.contract.steering import GateSettings
from service.engine.block_manager import BlockManager
from service.engine.gate.report import GateReporter
from service.engine.gate.settings import CHECKPOINT_GATE, AdmittedGate, weight_ratio, with_top_k
from service.engine.model_runner import ModelRunner, OutOfMemory, SequenceResult
from service.engine.plan import Plan, ScheduledSequence
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.grammar import Grammar, Grammars

logger = logging.getLogger(__name__)

_NOT_FINITE = Failure(
    "the model computed numbers that are not finite (NaN or infinity) for this request: they overflow its dtype; "
    "use smaller experts.weights, or start the server with --dtype bfloat16 or float32"
)
_COMPILING_SECONDS = 0.05  # a step with nothing else to do waits so long for a grammar


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
        return self._scheduler.has_work() or bool(self._compiling)

    def step(self) -> StepOutput:
        """Advances every scheduled sequence by one forward pass."""
        started = time.perf_counter()
        refused = self._queue_compiled() if self._compiling else []
        if refused or not self._scheduler.has_work():
            return StepOutput(refused, self._with_load(StepStats()))
        plan = self._scheduler.schedule()
        try:
            results = self.runner.run(plan.scheduled, keep_gate_logits=self._reporter.logs_scalings)
        except OutOfMemory as error:
            logger.error("out of memory: %s", error)
            return self._shed(plan, started)
        return self._postprocess(plan, results, started)

    def report(self) -> StepOutput:
        """The load as it is, without a step: what there is to say after an abort has left nothing to do."""
        stats = StepStats()
        self._reporter.flush(stats)
        return StepOutput(stats=self._with_load(stats))

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
                refused.append(_failed(sequence, failure))
        return refused

    def _drop(self, sequence: Sequence) -> None:
        request_id = sequence.request.id
        if request_id not in self._compiling:
            self._scheduler.remove(sequence)
        siblings = self._sequences[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[request_id]
            self._compiling.pop(request_id, None)

    def _postprocess(self, plan: Plan, results: list[SequenceResult], started: float) -> StepOutput:
        """Verifies drafts and accepts tokens, reports what has become final, ends what has ended."""
        stats = StepStats(preemptions=plan.preemptions)
        outputs = [self._advance(result, stats) for result in results]
        sequences = [one.sequence for one in plan.scheduled]
        ended = [s for s, output in zip(sequences, outputs, strict=True) if output.finish_reason is not None]
        rows = self._reporter.report(results, ended, stats)
        news: list[SequenceOutput] = []
        for sequence, output, gate in zip(sequences, outputs, rows, strict=True):
            output.gate = gate
            if output.finish_reason != "error":
                self._scheduler.commit(sequence)
            if output.tokens or gate is not None or output.prompt_logprobs or output.finish_reason is not None:
                news.append(output)
            if output.finish_reason is not None:
                self._drop(sequence)
        stats.step_seconds = time.perf_counter() - started
        return StepOutput(news, self._with_load(stats))

    def _shed(self, plan: Plan, started: float) -> StepOutput:
        """Ends the sequence that had most rows in a step that was too large (the latest of several), for the others'
        sake. They run the same rows again.
        """
        self.runner.free_memory()
        _, number = max((one.rows, number) for number, one in enumerate(plan.scheduled))
        sequence = plan.scheduled[number].sequence
        with suppress(RuntimeError, MemoryError):  # to read its last statistics takes memory as well
            self._reporter.drop(sequence)
        self._drop(sequence)
        output = _failed(sequence, Failure("the server is out of memory"))
        stats = StepStats(step_seconds=time.perf_counter() - started, preemptions=plan.preemptions)
        self._reporter.flush(stats)
        return StepOutput([output], self._with_load(stats))

    def _with_load(self, stats: StepStats) -> StepStats:
        stats.requests_running = len(self._scheduler.running)
        stats.requests_waiting = len(self._scheduler.waiting)
        stats.kv_blocks_used, stats.kv_blocks_total = self.blocks.used, self.blocks.num_blocks
        return stats

    def _advance(self, result: SequenceResult, stats: StepStats) -> SequenceOutput:
        """One sequence after its rows have run: what is new of it, but for its gate rows. What it raises ends it."""
        scheduled, error = result.scheduled, result.error
        sequence = scheduled.sequence
        output = SequenceOutput(sequence.request.id, sequence.index, usage=sequence.usage)
        try:
            if error is None and not result.finite:
                if sequence.retry_without_drafts(scheduled.scaling_end, scheduled.real_end):
                    _count(scheduled, stats)
                    return output
                self._scheduler.forget(sequence)
                error = _NOT_FINITE
            if error is None:
                output.tokens, output.finish_reason = self._accept(result, stats)
                output.prompt_logprobs = result.prompt_logprobs
        except Exception as raised:
            if not isinstance(raised, InvalidRequestError):  # as of a grammar, which is the caller's
                logger.exception("request %s failed", sequence.request.id)
            error = Failure.of(raised, "the engine failed on this request")
        return output if error is None else _failed(sequence, error)

    def _accept(self, result: SequenceResult, stats: StepStats) -> tuple[list[TokenOutput], FinishReason | None]:
        """Streams, drafts, usage. Returns the tokens accepted, and the end."""
        scheduled = result.scheduled
        sequence = scheduled.sequence
        if not sequence.started:
            sequence.started = True
            sequence.usage.queue_seconds = time.monotonic() - sequence.arrival_time
        sequence.scaling.computed = scheduled.scaling_end
        sequence.real.computed = scheduled.real_end
        if scheduled.scores:
            sequence.scored = scheduled.scores.stop
        accepted, reason = self._verify(sequence, result.tokens)
        if reason is not None:
            sequence.give_up_drafts()
        elif result.predictions and sequence.scaling.computed == scheduled.scaling_end:  # made after right tokens
            sequence.predict(scheduled.predict_start, result.predictions)
        _count(scheduled, stats)
        return accepted, reason

    def _verify(self, sequence: Sequence, sampled: list[TokenOutput]) -> tuple[list[TokenOutput], FinishReason | None]:
        """Accepts sampled tokens in order, as long as the rows they come from were run on the right tokens."""
        if not sequence.generates:
            return [], "length" if sequence.scaling.computed == sequence.prompt_len else None
        if sequence.scores_only:
            return [], "length" if sequence.scored == sequence.score_end else None
        for count, token in enumerate(sampled, start=1):
            drafted = sequence.accept(token.id)
            reason = self._finish_reason(sequence, token.id)
            if reason is not None or not drafted:
                return sampled[:count], reason
        return sampled, None

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Whether a sequence ends with the token it has just accepted."""
        if token in sequence.ends:
            return "stop"
        if sequence.grammar is not None and sequence.grammar.finished:
            return "stop"
        return "length" if sequence.output_len >= sequence.sampling.max_tokens else None


def _failed(sequence: Sequence, failure: Failure) -> SequenceOutput:
    return SequenceOutput(
        sequence.request.id,
        sequence.index,
        finish_reason="error",
        usage=sequence.usage,
        error=failure.message,
        error_param=failure.param,
    )


def _count(scheduled: ScheduledSequence, stats: StepStats) -> None:
    """Adds one sequence's step to its usage and to the step's statistics."""
    sequence, usage = scheduled.sequence, scheduled.sequence.usage
    lookahead, copying = sequence.lookahead, sequence.prompt_lookup
    before = (usage.draft_hits, usage.draft_misses, usage.speculated_tokens, usage.accepted_tokens)
    usage.forward_passes += 1
    usage.scaling_rows += scheduled.scaling_count
    usage.real_rows += scheduled.real_count
    usage.draft_hits, usage.draft_misses = lookahead.kept, lookahead.dropped
    usage.speculated_tokens, usage.accepted_tokens = copying.kept + copying.dropped, copying.kept
    stats.scaling_rows += scheduled.scaling_count
    stats.real_rows += scheduled.real_count
    stats.draft_hits += usage.draft_hits - before[0]
    stats.draft_misses += usage.draft_misses - before[1]
    stats.speculated_tokens += usage.speculated_tokens - before[2]
    stats.accepted_tokens += usage.accepted_tokens - before[3]
