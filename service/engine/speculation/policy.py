"""DraftPolicy: an engine's acceptance rates of drafts over all sequences, and its cost of a step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from service.engine.sequence import LOOKUP_RATE, Sequence
from service.engine.speculation.costs import BreakEven, StepCost
from service.engine.speculation.drafters import Record

_BREAK_EVEN_STEPS = 64  # after so many steps, the break-even probabilities are computed anew


class DraftPolicy:
    """Decides the probability of being right from which on a draft pays. Knows no single sequence."""

    def __init__(
        self, *, lookahead: bool, rates: SequenceOf[float], speculative_tokens: int, cost: StepCost | None
    ) -> None:
        self.lookahead = lookahead  # whether the scaling pass drafts
        self.rates = rates  # expected acceptance rates of its drafts at depth 1, 2, ...
        self.speculative_tokens = speculative_tokens  # prompt-lookup drafts of a sequence in a step, at most
        self._cost = StepCost() if cost is None else cost
        self._by_depth = [Record(rate) for rate in rates]  # over all sequences
        self._lookup = Record(LOOKUP_RATE)
        self._break_even: dict[int, BreakEven] = {}  # by the number of sequences, for _BREAK_EVEN_STEPS
        self._steps = 0

    @property
    def cost(self) -> StepCost:
        """The cost of a step."""
        return self._cost

    @cost.setter
    def cost(self, cost: StepCost) -> None:
        self._cost = cost
        self._break_even.clear()

    @property
    def records(self) -> list[Record]:
        """The records of the scaling pass's drafts, by depth."""
        return self._by_depth

    def begin(self, sequence: Sequence) -> None:
        """Gives a new sequence its records, which begin with the rates over all sequences."""
        used_at = sequence.prompt_len
        sequence.set_records([record.begin(used_at) for record in self._by_depth], self._lookup.begin(used_at))

    def break_even(self, sequences: int) -> BreakEven:
        """The break-even probabilities of drafts in the next step, of `sequences` sequences."""
        self._steps += 1
        if self._steps % _BREAK_EVEN_STEPS == 0:
            self._break_even.clear()
        if sequences not in self._break_even:
            rates = [record.rate for record in self._by_depth]
            self._break_even[sequences] = BreakEven.of(self._cost, sequences, rates, self.speculative_tokens)
        return self._break_even[sequences]
