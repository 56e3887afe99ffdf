"""The part of the answers of both of OpenAI's generating routes that stands around their choices, and our fields of a
choice.

`xlora` of an answer and of each chunk is the seed, `experts` and `gate` where the request is steered (by its `model` or
its `xlora`), and what the engine did; of a choice, its scalings and why it ended, where OpenAI has no word for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from service.api.generation.choice import Delta
from service.api.generation.run import Run
from service.api.schemas import openai_answers as answers
from service.api.schemas.openai import OpenAIFields


class Frame:
    """Head, usage and cost."""

    def __init__(self, run: Run, body: OpenAIFields) -> None:
        options = body.stream_options
        self.usage_last = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._generation = run.generation
        self._told_tokens = 0  # that chunks have brought so far
        self._as_used: answers.AsUsed = {"seed": run.seed, **run.steering}
        self._head: answers.OpenAIHead = {
            "id": run.id,
            "created": int(time.time()),
            "model": body.model or run.info.model,
            "system_fingerprint": f"fp_{(run.info.weights_sha256 or run.info.fingerprint)[:12]}",
        }
        usage: answers.ChunkUsage = {"usage": None} if self.usage_last else {}
        self._silent: answers.OpenAIChunk = {**self._head, "xlora": self._as_used, **usage}

    def whole(self) -> answers.OpenAIAnswer:
        """Of a whole answer, and of the chunk without choices, for who asked for the usage."""
        usage = self._usage(self._generation.completion_tokens)
        return {**self._head, "usage": usage, "xlora": {**self._as_used, **self._generation.cost()}}

    def chunk(self, delta: Delta) -> answers.OpenAIChunk:
        """Of the chunk that brings a delta."""
        self._told_tokens += delta.token is not None
        if self._usage_always:
            return {**self._head, "xlora": self._as_used, "usage": self._usage(self._told_tokens)}
        return self._silent

    def _usage(self, completion: int) -> answers.OpenAIUsage:
        prompt = self._generation.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._generation.cached_tokens},
        }


def choice_xlora(run: Run, index: int, deltas: Sequence[Delta]) -> answers.ChoiceXLora:
    """Return the end of each choice of a whole answer, with its scalings where they are asked for."""
    reason = deltas[-1].finish_reason
    ours: answers.ChoiceDetails = {**run.scalings(index, deltas), **_end(reason)}
    written: answers.ChoiceXLora = {"finish_reason": openai_reason(reason)}
    if ours:
        written["xlora"] = ours
    return written


def delta_xlora(run: Run, delta: Delta) -> answers.DeltaXLora:
    """The same of what a delta adds to a choice."""
    ours: answers.DeltaDetails = {**run.scalings_delta(delta), **_end(delta.finish_reason)}
    written: answers.DeltaXLora = {"finish_reason": openai_reason(delta.finish_reason)}
    if ours:
        written["xlora"] = ours
    return written


def openai_reason(reason: str | None) -> answers.FinishReason | None:
    """Who was cut short, by whatever it was, is cut short to OpenAI's clients."""
    if reason is None:
        return None
    return "stop" if reason == "stop" else "length"


def _end(reason: str | None) -> answers.WithEnd:
    """The reason, where OpenAI has no word for it."""
    return {} if reason in (None, "stop", "length") else {"finish_reason": reason}
