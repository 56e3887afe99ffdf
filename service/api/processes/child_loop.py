"""The inside of a bounded process: its limits, and a line of answer for each line of question until there are no more.

Imports what starts quickly. What goes wrong with a question belongs into its answer; an exception ends the process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

_ORPHAN_SECONDS = 300  # an answer that takes longer is nobody's: the parent, which would have ended this, is gone


def limit_process(memory_bytes: int) -> None:
    """Bounds the address space; what is sent to a whole group of processes is the parent's business."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer_lines(answer: Callable[[bytes], bytes]) -> None:
    """Says with an empty line that it is ready, then answers."""
    output = _take_stdout()
    _say(output, b"")
    for line in sys.stdin.buffer:
        signal.alarm(_ORPHAN_SECONDS)
        _say(output, answer(line))
        signal.alarm(0)


def _take_stdout() -> BinaryIO:
    """Standard output, for answers alone. What libraries print while they fail on a stranger's question goes nowhere:
    it would be taken for an answer, or fill the log; the parent says how this ended.
    """
    output = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return output


def _say(output: BinaryIO, line: bytes) -> None:
    output.write(line + b"\n")
    output.flush()
