"""A process that tries out forms of text: one JSON form a line in, one JSON verdict a line out, until its input ends.

    python -m service.engine.grammar_check TOKENIZER VOCAB_SIZE [EOS_TOKEN_ID ...]

Compiling cannot be interrupted, and what a stranger sends may take minutes or all memory. This process can be killed.
"""

from __future__ import annotations

import resource
import signal
import sys

import msgspec

from service.engine.grammar import GrammarCompiler
from service.engine.request import TextForm
from service.errors import InvalidRequestError

_MOST_MEMORY_BYTES = 2 << 30  # of address space; a common grammar takes a few megabytes


class Verdict(msgspec.Struct, frozen=True):
    """Whether a form can be compiled, and why not."""

    error: str | None = None


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY_BYTES, _MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(argv[1], int(argv[2]), [int(id) for id in argv[3:]])
    decoder = msgspec.json.Decoder(TextForm)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(_judge(compiler, decoder.decode(line))) + b"\n")
        sys.stdout.buffer.flush()
    return 0


def _judge(compiler: GrammarCompiler, form: TextForm) -> Verdict:
    try:
        compiler.compile(form)
    except InvalidRequestError as error:
        return Verdict(error.message)
    return Verdict()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
