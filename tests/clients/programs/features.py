"""What every program here tries, and how it says what came of it: one line of JSON, a reason by feature or null.

Runs in the environments of the clients: only Python's own library is there for certain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

QUESTION = "Compute 48 + 87."


def run(features: Mapping[str, Callable[[], None]]) -> None:
    """Tries each; what it raises is the reason why the client cannot."""
    found: dict[str, str | None] = {}
    for name, attempt in features.items():
        try:
            attempt()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps(found), flush=True)


def address() -> str:
    """Where the server's OpenAI routes are."""
    return sys.argv[1]


def says_something(text: str | None) -> None:
    """An answer of the demo to QUESTION, which is sampled, so it may be wrong."""
    assert text, "no text"


def came_in_pieces(pieces: list[str]) -> None:
    """The same of a stream."""
    assert len(pieces) > 3, f"{len(pieces)} pieces are no stream"
    says_something("".join(pieces))
