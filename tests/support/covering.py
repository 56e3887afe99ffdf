"""A small part of a product of settings in which small groups of values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Point = tuple[int, ...]  # the index of one value of every setting


def covering(settings: Sequence[Sequence[Any]], strength: int) -> list[Point]:
    """Points in which every `strength` values of as many settings meet; greedy, and always the same."""
    product = list(itertools.product(*(range(len(values)) for values in settings)))
    groups = list(itertools.combinations(range(len(settings)), strength))

    def met(point: Point) -> set[tuple[Point, Point]]:
        return {(group, tuple(point[index] for index in group)) for group in groups}

    meetings = {point: met(point) for point in product}
    missing = set().union(*meetings.values())
    chosen = []
    while missing:
        best = max(product, key=lambda point: len(meetings[point] & missing))
        chosen.append(best)
        missing -= meetings[best]
    return chosen
