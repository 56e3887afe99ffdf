"""Counters of drafts: how many were kept and dropped, by source, and by how far each was from what it was made of."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter

from service.contract.output import DraftCounts

_MAX_DEPTH = 8  # drafts from it on share a label


class DraftCounters:
    """Three series of one fact: a sum for each source, and both sources by depth."""

    def __init__(self, counter: Callable[..., Counter]) -> None:
        """`counter` makes one of a name, what it means, and the names of its labels."""
        lookahead = counter(
            "lookahead_drafts", "Drafts of the scaling pass, of all depths, kept (hit) or dropped (miss).", "outcome"
        )
        speculated = counter(
            "speculated_tokens", "Drafts from earlier text, kept (accepted) or dropped (rejected).", "outcome"
        )
        self._hits, self._misses = (lookahead.labels(outcome) for outcome in ("hit", "miss"))
        self._accepted, self._rejected = (speculated.labels(outcome) for outcome in ("accepted", "rejected"))
        self._by_depth = counter(
            "draft_tokens",
            "Drafts that had rows, kept or dropped, by source and by how far each was from what it was made of.",
            *("source", "depth", "outcome"),
        )

    def expect(self, depth: int) -> None:
        """Shows the series of a scaling pass that drafts so many tokens, before there are any."""
        for number in range(1, depth + 1):
            for outcome in ("kept", "dropped"):
                self._by_depth.labels("lookahead", _label(number), outcome)

    def count(self, drafts: DraftCounts) -> None:
        """More drafts."""
        self._hits.inc(drafts.hits)
        self._misses.inc(drafts.misses)
        self._accepted.inc(drafts.accepted)
        self._rejected.inc(drafts.speculated - drafts.accepted)
        for source, kept, dropped in (
            ("lookahead", drafts.lookahead_kept, drafts.lookahead_dropped),
            ("prompt_lookup", drafts.lookup_kept, drafts.lookup_dropped),
        ):
            for outcome, counts in (("kept", kept), ("dropped", dropped)):
                for depth, count in enumerate(counts, start=1):
                    self._by_depth.labels(source, _label(depth), outcome).inc(count)


def _label(depth: int) -> str:
    return str(depth) if depth < _MAX_DEPTH else f"{_MAX_DEPTH}+"
