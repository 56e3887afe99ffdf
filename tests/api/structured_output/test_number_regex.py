"""Ranges of numbers: what their expressions match, and what Python's numbers say of the same texts."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal, localcontext

from service.api.structured_output.number_regex import Range, exact, is_too_long

BOUNDS = [0, 1, -1, 0.5, -0.5, 0.1, -0.1, 0.3, 9, 10, 99, 100, 101, -10, -100, 123.456, 1e-7, 1e15, 1e23, -1e23,
          2**53 + 1, 12345678901234567890, 0.30000000000000004, 1e300, -1e300, 1e-300, -0.0]  # fmt: skip
STEPS = ["0", "1", "-1", "0.1", "-0.1", "1e-7", "-1e-7", "1e-16", "-1e-16", "1e-20", "-1e-20"]


def around(bound: float) -> list[str]:
    with localcontext() as context:
        context.prec = 400
        return [f"{exact(bound) + Decimal(step):f}" for step in STEPS]


TEXTS = ["0", "-1", "5", "7.25", "-3.5", "1234567", "0.0", "-0.0", "1.0", "10.00"]
TEXTS += [text for bound in BOUNDS if not is_too_long(bound) for text in around(bound)]


def test_no_text_is_beyond_its_bounds_and_all_common_ones_are_taken() -> None:
    """Integers as integers and fractions as doubles, as readers of JSON have them: 0.29999999999999999 is 0.3."""
    chance, taken = random.Random(1), 0
    for _ in range(600):
        least, most = chance.choice([None, *BOUNDS]), chance.choice([None, *BOUNDS])
        above, below, integral = (chance.random() < 0.5 for _ in range(3))
        wanted = Range(integral=integral, digits=chance.choice([20, None]))
        wanted = wanted if least is None else wanted.at_least(least, above)
        wanted = wanted if most is None else wanted.at_most(most, below)
        normal = None if (least or 0) >= 1e40 or (most or 0) <= -1e40 else wanted.normal()
        expressions = [re.compile(one) for one in (normal.regexes() if normal is not None else ["(?!)"])]
        for text in TEXTS:
            value = json.loads(text)
            fits = not integral or isinstance(value, int)
            fits = fits and (least is None or (value > least if above else value >= least))
            fits = fits and (most is None or (value < most if below else value <= most))
            matches = all(one.fullmatch(text) for one in expressions)
            assert fits or not matches, (text, least, above, most, below)
            plain = len(text) < 12 and not text.startswith("-0")
            assert matches or not (fits and plain and normal is not None), (text, least, above, most, below)
            taken += matches
    assert taken > 5000
