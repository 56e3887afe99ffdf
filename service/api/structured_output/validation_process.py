"""The process that tries out forms of text: one JSON form a line in, one JSON verdict a line out.

    python -m service.api.structured_output.validation_process TOKENIZER VOCAB_SIZE [EOS_TOKEN_ID ...]

Compiling cannot be interrupted, and what a stranger sends may take minutes or all memory. This process can be killed.
"""

from __future__ import annotations

import sys

import msgspec

from service.api.processes.child_loop import answer_lines, limit_process
from service.contract.errors import InvalidRequestError
from service.contract.request import TextForm
from service.grammar import GrammarCompiler

_MAX_MEMORY_BYTES = 2 << 30  # of address space; a common grammar takes a few megabytes


class Verdict(msgspec.Struct, frozen=True):
    """Whether a form can be compiled, and why not."""

    error: str | None = None


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    limit_process(_MAX_MEMORY_BYTES)
    compiler = GrammarCompiler(argv[1], int(argv[2]), [int(id) for id in argv[3:]])
    decoder = msgspec.json.Decoder(TextForm)
    _judge(compiler, TextForm(regex="a"))  # loads the library and the vocabulary
    answer_lines(lambda line: msgspec.json.encode(_judge(compiler, decoder.decode(line))))
    return 0


def _judge(compiler: GrammarCompiler, form: TextForm) -> Verdict:
    try:
        compiler.compile(form)
    except InvalidRequestError as error:
        return Verdict(error.message)
    return Verdict()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
