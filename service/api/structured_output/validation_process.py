"""The process that compiles grammars: one JSON question a line in, one JSON validation a line out.

    python -m service.api.structured_output.validation_process TOKENIZER VOCAB_SIZE [EOS_TOKEN_ID ...]

Compiling cannot be interrupted, and what a stranger sends may take minutes or all memory. This process can be killed.
"""

from __future__ import annotations

import json
import sys

import msgspec

from service.api.processes.child_loop import answer_lines, limit_process
from service.api.structured_output.keywords import FORMAT, TOOLS, refuse
from service.api.structured_output.lark import calls_grammar, schema_grammar
from service.api.structured_output.schema import Document
from service.contract.errors import InvalidRequestError
from service.contract.request import FormLimits, GrammarSpec
from service.grammar import GrammarCompiler, GrammarError

_MAX_MEMORY_BYTES = 2 << 30  # of address space; a common grammar takes a few megabytes


class SentSchema(msgspec.Struct, frozen=True):
    """A schema as it was sent."""

    path: str  # in the request
    json: str

    def document(self) -> Document:
        """The same, read."""
        return Document(self.path, json.loads(self.json))


class Question(msgspec.Struct, frozen=True):
    """A form as it is asked for: exactly one of schema, calls and expression."""

    param: str  # of the request, to blame for what has no path of its own
    json_schema: SentSchema | None = None
    calls: tuple[tuple[str, SentSchema], ...] = ()  # names of functions, of which one is called, and their arguments
    regex: str | None = None
    limits: FormLimits = FormLimits()

    @property
    def field(self) -> str:
        """The field of the request that it comes from."""
        return TOOLS if self.param.startswith(TOOLS) else FORMAT


class Validation(msgspec.Struct, frozen=True):
    """The grammar of a schema, or why a form cannot be enforced."""

    grammar: str | None = None
    error: str | None = None
    param: str | None = None
    hint: str | None = None


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    limit_process(_MAX_MEMORY_BYTES)
    compiler = GrammarCompiler(argv[1], int(argv[2]), [int(id) for id in argv[3:]])
    decoder = msgspec.json.Decoder(Question)
    judge(compiler, Question("", regex="a"))  # loads the library and the vocabulary
    answer_lines(lambda line: msgspec.json.encode(judge(compiler, decoder.decode(line))))
    return 0


def judge(compiler: GrammarCompiler, asked: Question) -> Validation:
    """The grammar of a form, which has been compiled to see whether that can be done."""
    try:
        grammar = _grammar(asked, compiler)
        form = GrammarSpec(grammar=grammar, regex=asked.regex)
        _compile(compiler, form, asked)
        if asked.regex is not None:
            compiler.rehearse(form)
    except GrammarError as error:
        return Validation(error=error.message, param=asked.param, hint=error.hint)
    except InvalidRequestError as error:
        return Validation(error=error.message, param=error.param, hint=error.hint)
    return Validation(grammar)


def _compile(compiler: GrammarCompiler, form: GrammarSpec, asked: Question) -> None:
    try:
        compiler.compile(form)
    except GrammarError as error:
        if asked.regex is None or error.hint is not None:
            raise
        refuse(asked.param, f"cannot be enforced: {error.message}")


def _grammar(asked: Question, compiler: GrammarCompiler) -> str | None:
    if asked.json_schema is not None:
        return schema_grammar(asked.json_schema.document(), asked.limits, compiler)
    if asked.calls:
        return calls_grammar({name: sent.document() for name, sent in asked.calls}, asked.limits, compiler)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
