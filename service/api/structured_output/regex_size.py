"""How large an expression is with its repetitions written out: (ab{3}){2} has 8 parts. It need not be a valid one."""

from __future__ import annotations

import math
import re

from service.api.structured_output.keywords import refuse

MAX_CHARACTERS = 4096
MAX_SIZE = 10_000

_TOKEN = re.compile(
    r"""
      \\[pP]\{[^}]*\} | \\.                                 # one character, or a class of them ...
    | \[\^?\]?(?:\\.|\[(?:\\.|[^\]\[\\])*\]|[^\]\[\\])*\]  # ... in which there may be others
    | \{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\}         # a repetition
    | \((?:\?(?:P?<\w*>|[\w-]*:))? | \) | .
    """,
    re.VERBOSE | re.DOTALL,
)


def check_regex_size(pattern: str, path: str) -> None:
    """Raises InvalidRequestError for an expression that would take too long to compile."""
    if len(pattern) > MAX_CHARACTERS:
        refuse(path, f"has {len(pattern)} characters; at most {MAX_CHARACTERS} are allowed")
    size = regex_size(pattern)
    if size > MAX_SIZE:
        reason = f"has {size:.3g} parts with its repetitions written out; at most {MAX_SIZE} are allowed"
        refuse(path, reason, "use smaller counts, or * and +")


def regex_size(pattern: str) -> float:
    """The number of parts."""
    groups: list[float] = [0.0]  # the size of each open group so far
    last = 0.0  # of what a repetition would repeat
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if text == "[":
            return math.inf  # no end, or classes nested too deep to be read here
        if text.startswith("("):
            groups.append(0.0)
            last = 0.0
            continue
        if text == ")" and len(groups) > 1:
            last = groups.pop()
        elif text.startswith("{") and (token["least"] or token["most"]):
            times = max(_count(token["least"]), _count(token["most"]))
            groups[-1] += last * (times - 1)
            last *= times
            continue
        elif text not in "*+?|":
            last = 1.0
        else:
            continue
        groups[-1] += last
    total = sum(groups)
    return math.inf if math.isnan(total) else total  # infinitely often nothing


def _count(digits: str) -> float:
    return float(digits) if digits else 1.0
