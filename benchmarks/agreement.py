"""How often drafts agree, how many forwards a token follows from that, and how fast X-LoRA is then over its base.

    a_1    the share of the scaling pass's predictions that are right, of those made of right tokens
    a_i    the share of right drafts at depth i, where all before them were right
    L      1 + a_2 + a_2 a_3 + ... + a_2 ... a_m, tokens that a forward brings where it contradicts none
    f      2 (1 - a_1) + a_1 / L, forwards per token

The scaling pass overrules every deeper draft from nearer before the real pass sees it. So the real pass contradicts a
share 1 - a_1 of all tokens, and each of them costs two forwards, a scaling row alone and a single real row; the others
come L at a time. An answer begins as it goes on after a miss: its first token takes two forwards; and its last forward
brings tokens behind its end. (Taken for granted: where a draft from afar is right, one from nearer is as well.) DESIGN
3.1 states what holds without overruling, with n full forwards between misses:

    n = a_1 / (1 - a_1 a_2 ... a_m)        (2 + n) / (1 + n L)
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from operator import mul
from typing import Any

from service.engine.engine import Engine
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.memory_plan import weight_bytes
from service.engine.model_runner import ModelRunner
from service.engine.sequence import Sequence
from service.engine.speculation.costs import BreakEven, StepCost
from service.engine.speculation.drafters import ANY_TOKEN
from service.model.adapted import AdaptedModule
from service.model.xlora_model import XLoraModel


@dataclass(slots=True)
class _Look:
    """Predictions of one step for one sequence, and the drafts that the first of them in doubt began."""

    sequence: Sequence
    known: int  # tokens of the sequence then
    drafts: list[int]  # that it had
    start: int  # position of the first prediction
    predictions: list[int]
    first: int  # number of the first one that differs from what was expected
    deeper: list[int]  # drafts behind it


@dataclass(slots=True)
class Judged:
    """Drafts whose predecessors were right, by depth from 1 on: those that were right as well, and all."""

    right: list[int] = field(default_factory=list)
    all: list[int] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """a_1, a_2, ..."""
        return [right / count for right, count in zip(self.right, self.all, strict=True)]

    def judge(self, depth: int, *, right: bool) -> None:
        """One draft at `depth`, whose predecessors were right."""
        for counts in (self.right, self.all):
            counts += [0] * (depth - len(counts))
        self.right[depth - 1] += right
        self.all[depth - 1] += 1


class WatchedRunner(ModelRunner):
    """Keeps what was predicted and drafted, whether it ever had rows or not, to be judged by the finished texts."""

    def __init__(self, runner: ModelRunner) -> None:
        self.__dict__.update(runner.__dict__)
        self._looks: list[_Look] = []

    def collect(self, launched: LaunchedStep) -> list[SequenceResult]:
        """The step's results as ever."""
        results = super().collect(launched)
        for result in results:
            one, sequence = result.scheduled, result.scheduled.sequence
            if result.predictions:
                pairs = enumerate(zip(result.predictions, one.expected, strict=True))
                differing = (number for number, (token, other) in pairs if other not in (token, ANY_TOKEN))
                first = next(differing, len(result.predictions))
                drafts, predictions, deeper = list(sequence.drafts), list(result.predictions), list(result.deeper)
                look = _Look(sequence, len(sequence.tokens), drafts, one.predict_start, predictions, first, deeper)
                self._looks.append(look)
        return results

    def judged(self) -> Judged:
        """All that was predicted since the last call; the sequences have ended."""
        judged = Judged()
        for look in self._looks:
            _judge(look, judged)
        self._looks.clear()
        return judged


def _judge(look: _Look, judged: Judged) -> None:
    text = look.sequence.tokens
    for number, token in enumerate(look.predictions):
        position = look.start + number
        before = look.drafts[: position - look.known]
        if position >= len(text) or before != text[look.known : look.known + len(before)]:
            return  # the rest is made of wrong tokens, or stands behind the end
        judged.judge(1, right=token == text[position])
        if number == look.first:
            break
    else:
        return
    for depth, draft in enumerate([look.predictions[look.first], *look.deeper], start=1):
        if position >= len(text):
            return
        if depth > 1:
            judged.judge(depth, right=draft == text[position])
        if draft != text[position]:
            return
        position += 1


def watch(engine: Engine) -> WatchedRunner:
    """Makes `engine` keep its drafts."""
    engine.runner = runner = WatchedRunner(engine.runner)
    return runner


@dataclass(frozen=True)
class Forwards:
    """Of one token, in the mean."""

    misses: float  # of two forwards each: a scaling row alone, then a single real row before the drafts
    full: float  # forwards that verify what was drafted
    length: float  # L
    behind_end: float  # tokens that the last forward of an answer brings in vain

    @classmethod
    def of(cls, rates: SequenceOf[float]) -> Forwards:
        """Of drafts that agree with a_1, a_2, ...; none: two forwards per token."""
        right, length = rates[0] if rates else 0.0, tokens_brought(rates)
        at_least = accumulate(rates[1:], mul, initial=1.0)  # chances of 1, 2, ... tokens
        squared = sum((2 * count - 1) * chance for count, chance in enumerate(at_least, start=1))
        return cls(1 - right, right / length, length, (squared / length - 1) / 2)


def tokens_brought(rates: SequenceOf[float]) -> float:
    """L"""
    return sum(accumulate(rates[1:], mul, initial=1.0))


def forwards_per_token(rates: SequenceOf[float], tokens: float = math.inf) -> float:
    """f, of answers of so many tokens."""
    own = Forwards.of(rates)
    return _with_first(2 * own.misses + own.full, tokens) + own.full * own.behind_end / tokens


def without_overruling(rates: SequenceOf[float], tokens: float = math.inf) -> float:
    """The same by the formula of DESIGN 3.1."""
    if not rates:
        return 2.0
    misses = 1 - math.prod(rates)
    return _with_first((2 * misses + rates[0]) / (misses + rates[0] * tokens_brought(rates)), tokens)


def _with_first(steady: float, tokens: float) -> float:
    return steady + (2 - steady) / tokens


@dataclass(frozen=True)
class Costs:
    """Of X-LoRA's forwards, in forwards of the plain base with one row."""

    scaling: float  # a scaling row alone: the base's weights and the classifier's
    real: float  # a forward with a real row: the experts' weights on top
    step: StepCost  # of a step by its rows, as the engine has measured it
    layer: float  # a draft by the draft layer: its weights and the head's

    def depth(self, rates: SequenceOf[float]) -> int:
        """How deep the engine drafts for one sequence, by the break-even rule, where drafts agree with a_1, a_2, ..."""
        needed = BreakEven.of(self.step, 1, rates, 0).lookahead
        pays = (right >= least for right, least in zip(accumulate(rates, mul), needed, strict=True))
        return sum(takewhile(bool, pays))

    def over_base(self, rates: SequenceOf[float]) -> float:
        """Tokens per second over the base's, of drafts that agree with a_1, a_2, ..., as deep as pays: without the
        host's work.
        """
        depth = self.depth(rates)
        own = Forwards.of(rates[:depth])
        after_miss, full = self._mixed(1 + depth), self._mixed(own.length + depth)
        layer = max(0, depth - 1) * self.layer * (2 * own.misses + own.full)
        return 1 / (own.misses * (self.scaling + after_miss) + own.full * full + layer)

    def _mixed(self, rows: float) -> float:
        """A forward of so many rows, at least one of them real."""
        return self.real * self.step.seconds(rows) / self.step.seconds(1)


def costs_of(engine: Engine) -> Costs:
    """Of an engine: by the bytes of its weights, and by the cost of a row that it has measured."""
    model: XLoraModel = engine.runner.model
    base, experts, classifier = read_bytes(model)
    layer = 0
    if model.draft_chain is not None:
        head: Any = model.causal_lm.get_submodule("lm_head")
        layer = sum(tensor.nbytes for tensor in model.draft_chain.layer.parameters()) + head.weight.nbytes
    scaling = (base + classifier) / base
    return Costs(scaling, scaling + experts / base, engine._scheduler.drafts.cost, layer / base)


def read_bytes(model: XLoraModel) -> tuple[int, int, int]:
    """Bytes that a forward reads of the base, of the experts and of the classifier: of embeddings, next to none."""
    sizes = weight_bytes(model)
    embedding: Any = model.decoder.get_input_embeddings()  # type: ignore[operator]
    looked_up = embedding.weight.nbytes if not isinstance(embedding, AdaptedModule) else 0
    return sizes.base - looked_up, sizes.experts, sizes.classifier
