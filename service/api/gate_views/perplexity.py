"""Whether the gate chose well: how likely a text is under X-LoRA, under the base, and under each expert alone.

Knows the columns and their arithmetic; who asks for them, and in what format, is scalings.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.api.generation.scoring import score_request
from service.api.schemas.answers import Likelihood, Perplexity
from service.contract.errors import InvalidRequestError
from service.contract.request import Request
from service.contract.steering import GateWeight, Steering

MAX_SCORED_TOKENS = 1 << 17  # of all columns over all texts

_MODELS: dict[str, Steering | None] = {"xlora": None, "base": Steering(weights=())}


@dataclass(frozen=True, slots=True)
class Columns:
    """The judges of a text: X-LoRA, the base, and experts alone with weight 1, by their places and names."""

    experts: Sequence[int]
    names: Sequence[str]

    @property
    def labels(self) -> list[str]:
        """Of a table."""
        return [*_MODELS, *(f"expert_{name}" for name in self.names)]

    def gates(self) -> list[Steering | None]:
        """In the order of the labels."""
        return [*_MODELS.values(), *(Steering(weights=(GateWeight(expert, 1.0),)) for expert in self.experts)]

    def requests(self, id: str, ids: list[int], start: int) -> list[Request]:
        """Scores of ids[start:], one request per column; none where no token has a predecessor."""
        first = max(1, start)
        if first >= len(ids):
            return []
        return [score_request(f"{id}-{number}", ids, first, gate) for number, gate in enumerate(self.gates())]

    def check_size(self, texts: Sequence[range]) -> None:
        """Raises InvalidRequestError where it would be too much. A text is read from its beginning in any case."""
        tokens = len(self.labels) * sum(positions.stop for positions in texts)
        if tokens > MAX_SCORED_TOKENS:
            raise InvalidRequestError(
                f"perplexity reads {tokens} tokens, each text {len(self.labels)} times; at most {MAX_SCORED_TOKENS} "
                "are allowed",
                param="perplexity",
                code="too_large",
                hint="send less text, or choose fewer experts with select.experts",
            )

    def document(self, likelihoods: Likelihoods) -> Perplexity:
        xlora, base, *experts = (
            Likelihood(perplexity=likelihoods.perplexity(number), logprobs=logprobs)
            for number, logprobs in enumerate(likelihoods.columns)
        )
        return {"xlora": xlora, "base": base, "experts": dict(zip(self.names, experts, strict=True))}


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Natural logs per column and position; None at a text's first token, which nothing predicts."""

    columns: list[list[float | None]]

    @classmethod
    def of(cls, columns: Columns, positions: int, found: Sequence[list[float]]) -> Likelihoods:
        """`found` may lack the first of `positions` tokens, or be empty."""
        scored = found or [[] for _ in columns.labels]
        return cls([[None] * (positions - len(logprobs)) + [*logprobs] for logprobs in scored])

    def perplexity(self, column: int) -> float | None:
        """exp of the mean negative log; None where nothing was judged, or where it is beyond all numbers."""
        known = [logprob for logprob in self.columns[column] if logprob is not None]
        mean = -math.fsum(known) / len(known) if known else math.inf
        return math.exp(mean) if mean < 700 else None
