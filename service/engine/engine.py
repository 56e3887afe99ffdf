"""The engine: schedule, run, postprocess. Token ids in, token ids and gate rows out; no text, no HTTP, no threads."""

from __future__ import annotations

import time
from collections.abc import Collection

from service.engine.block_manager import BlockManager
from service.engine.model_runner import ModelRunner, RunResult
from service.engine.request import EngineInfo, FinishReason, Request, SequenceOutput, StepOutput, StepStats, TokenOutput
from service.engine.scheduler import Plan, Scheduled, Scheduler
from service.engine.sequence import Sequence
from service.errors import InvalidRequestError


class Engine:
    """Serves any number of requests over one model. Single-threaded: call add, abort and step from one place."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, info: EngineInfo) -> None:
        self.info = info
        self._runner = runner
        self._scheduler = scheduler
        self._eos: Collection[int] = frozenset(info.eos_token_ids)
        self._sequences: dict[str, list[Sequence]] = {}  # by request id; finished choices are gone

    @property
    def blocks(self) -> BlockManager:
        """The KV pool's accounts."""
        return self._scheduler.blocks

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises InvalidRequestError when it can never be served: empty, an id that is in use, longer than the model's
        context or than the whole KV pool.
        """
        self._check_fits(request)
        if request.id in self._sequences:
            raise InvalidRequestError(f"request id {request.id!r} is in use", param="id")
        now = time.monotonic()
        choices = 1 if request.sampling is None else request.sampling.n
        self._sequences[request.id] = [Sequence.of(request, index, now) for index in range(choices)]
        for sequence in self._sequences[request.id]:
            self._scheduler.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices, and frees what it held. Unknown ids may have ended: ignored."""
        for sequence in list(self._sequences.get(request_id, ())):
            if index is None or sequence.index == index:
                self._drop(sequence)

    def has_work(self) -> bool:
        """Whether step() has anything to do."""
        return self._scheduler.has_work()

    def step(self) -> StepOutput:
        """Advances every scheduled sequence by one forward pass."""
        started = time.perf_counter()
        plan = self._scheduler.schedule()
        result = self._runner.run(plan)
        return self._postprocess(plan, result, started)

    def report(self) -> StepOutput:
        """The load as it is, without a step: what there is to say after an abort has left nothing to do."""
        return StepOutput(stats=self._with_load(StepStats()))

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every KV block is accounted for."""
        self._scheduler.check_integrity()

    def _check_fits(self, request: Request) -> None:
        output = 0 if request.sampling is None else request.sampling.max_tokens
        total = len(request.prompt_token_ids) + output
        if not request.prompt_token_ids:
            raise InvalidRequestError("the prompt is empty", param="prompt", hint="send at least one token")
        if request.sampling is not None and output < 1:
            raise InvalidRequestError(f"max_tokens is {output}; at least 1 is needed", param="max_tokens")
        if total > self.info.max_model_len:
            raise InvalidRequestError(
                f"prompt ({len(request.prompt_token_ids)} tokens) + max_tokens ({output}) = {total} is over the "
                f"context of {self.info.max_model_len} tokens",
                param="max_tokens",
                code="context_length_exceeded",
                hint="shorten the prompt or lower max_tokens",
            )
        if request.sampling is not None and request.sampling.prompt_logprobs is not None:
            raise InvalidRequestError("logprobs of the prompt's tokens are not computed yet", code="unsupported")
        streams = 1 if request.sampling is None else 2
        needed = streams * self.blocks.blocks_for(total)
        if needed > self.blocks.num_blocks:
            raise InvalidRequestError(
                f"the request needs {needed} KV blocks, and the server has {self.blocks.num_blocks} in all",
                code="context_length_exceeded",
                hint="shorten the prompt, lower max_tokens, or start the server with a larger --kv-memory",
            )

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        siblings = self._sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.id]

    def _postprocess(self, plan: Plan, result: RunResult, started: float) -> StepOutput:
        """Moves the streams forward, accepts tokens, keeps or drops drafted rows, ends what has ended."""
        outputs: list[SequenceOutput] = []
        stats = StepStats(preemptions=plan.preemptions, gate=result.gate_stats)
        for share, token, draft, gate in zip(plan.scheduled, result.tokens, result.drafts, result.gate, strict=True):
            self._advance(share, token, draft, stats)
            sequence = share.sequence
            reason = self._finish_reason(sequence, token)
            if token is not None or gate is not None or reason is not None:
                output = SequenceOutput(sequence.request.id, sequence.index, gate=gate, finish_reason=reason)
                output.tokens = [] if token is None else [token]
                output.usage = sequence.usage
                outputs.append(output)
            if reason is not None:
                self._drop(sequence)
        stats.step_seconds = time.perf_counter() - started
        return StepOutput(outputs, self._with_load(stats))

    def _with_load(self, stats: StepStats) -> StepStats:
        stats.requests_running = len(self._scheduler.running)
        stats.requests_waiting = len(self._scheduler.waiting)
        stats.kv_blocks_used, stats.kv_blocks_total = self.blocks.used, self.blocks.num_blocks
        return stats

    def _advance(self, share: Scheduled, token: TokenOutput | None, draft: int | None, stats: StepStats) -> None:
        """One sequence after its rows have run: stream positions, draft verdict, usage."""
        sequence, usage = share.sequence, share.sequence.usage
        if not sequence.started:
            sequence.started = True
            usage.queue_seconds = time.monotonic() - sequence.arrival_time
        hit = share.drafted and token is not None and token.id == sequence.draft
        miss = share.drafted and not hit
        sequence.scaling.computed += share.scaling_count - miss
        sequence.real.computed += share.real_count
        final = sequence.real.computed if sequence.generates else sequence.scaling.computed
        sequence.reported = max(sequence.reported, final)
        if token is not None:
            sequence.append(token.id)
            sequence.draft = None  # it was for the position this token now holds
        if share.scaling_count:
            sequence.draft = None if miss else draft
        usage.forward_passes += 1
        usage.scaling_rows += share.scaling_count
        usage.real_rows += share.real_count
        usage.draft_hits += hit
        usage.draft_misses += miss
        stats.scaling_rows += share.scaling_count
        stats.real_rows += share.real_count
        stats.draft_hits += hit
        stats.draft_misses += miss

    def _finish_reason(self, sequence: Sequence, token: TokenOutput | None) -> FinishReason | None:
        if not sequence.generates:
            return "length" if sequence.scaling.computed == sequence.prompt_len else None
        if token is None:
            return None
        params = sequence.sampling
        if token.id in params.stop_token_ids or (token.id in self._eos and not params.ignore_eos):
            return "stop"
        return "length" if sequence.output_len >= params.max_tokens else None
