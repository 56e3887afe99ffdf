"""The process that compiles forms of text: one JSON question a line in, one JSON verdict a line out.

    python -m service.api.structured_output.validation_process TOKENIZER VOCAB_SIZE [EOS_TOKEN_ID ...]

Compiling cannot be interrupted, and what a stranger sends may take minutes or all memory. This process can be killed.
"""

from __future__ import annotations

import json
import sys

import msgspec

from service.api.processes.child_loop import answer_lines, limit_process
from service.api.structured_output.lark import schema_grammar
from service.contract.errors import InvalidRequestError
from service.contract.request import FormLimits, TextForm
from service.grammar import GrammarCompiler

_MAX_MEMORY_BYTES = 2 << 30  # of address space; a common grammar takes a few megabytes


class Question(msgspec.Struct, frozen=True):
    """A form as it is asked for: exactly one of schema and expression."""

    json_schema: str | None = None
    regex: str | None = None
    limits: FormLimits = FormLimits()


class Verdict(msgspec.Struct, frozen=True):
    """The grammar of a schema, or why a form cannot be enforced."""

    grammar: str | None = None
    error: str | None = None
    param: str = "response_format"
    hint: str | None = None


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    limit_process(_MAX_MEMORY_BYTES)
    compiler = GrammarCompiler(argv[1], int(argv[2]), [int(id) for id in argv[3:]])
    decoder = msgspec.json.Decoder(Question)
    _judge(compiler, Question(regex="a"))  # loads the library and the vocabulary
    answer_lines(lambda line: msgspec.json.encode(_judge(compiler, decoder.decode(line))))
    return 0


def _judge(compiler: GrammarCompiler, asked: Question) -> Verdict:
    try:
        schema = asked.json_schema
        grammar = None if schema is None else schema_grammar(json.loads(schema), asked.limits, compiler)
        form = TextForm(grammar=grammar, regex=asked.regex)
        compiler.compile(form)
        if asked.regex is not None:
            compiler.rehearse(form)
    except InvalidRequestError as error:
        return Verdict(error=error.message, param=error.param or "response_format", hint=error.hint)
    return Verdict(grammar)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
