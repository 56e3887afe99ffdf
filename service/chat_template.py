"""Messages to text, by the tokenizer's own chat template.

The template is Jinja in a sandbox, with the same names in scope as transformers gives it (its apply_chat_template is
the oracle of the tests); transformers itself stays out of this process, and torch with it.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.contract.errors import InvalidRequestError
from service.tokenizer_files import TokenizerFiles

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER, TEMPLATE_NAME = (
    "additional_chat_templates",
    "default",
)  # of several, the one that chats are written with
MAX_SOURCE = 100_000  # characters of a template; the longest in use have 30,000, and compiling 100,000 takes seconds
_MAX_REASON_CHARACTERS = 300


def refusal(reason: str) -> InvalidRequestError:
    """The template cannot make a text of these messages."""
    return InvalidRequestError(f"the model's chat template does not take these messages: {reason}", param="messages")


class _Generation(Extension):
    """{% generation %} marks what a model is trained on; here its body is just text, and has names of its own."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Macro) -> str:
        return caller()


class ChatTemplate:
    """One model's template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        # Without an optimizer, and with a `finalize` that wants the context, nothing is computed while parsing: a
        # constant such as 9**9**9 would take for ever before any request came.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_as_it_is,
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The template beside a tokenizer.json: a file of its own, or a field of tokenizer_config.json. None: no chat.

        Raises jinja2.TemplateError for a template that is no Jinja; loading a checkpoint has refused those before.
        """
        file = template_file(directory)
        return cls.of(TokenizerFiles.read(directory), None if file is None else file.read_text("utf-8"))

    @classmethod
    def of(cls, files: TokenizerFiles, text: str | None) -> ChatTemplate | None:
        """The same from what the files hold; `text` is that of `template_file`, where there is one. Files go before the
        field of tokenizer_config.json, also where none of them is the one for chats.

        Raises jinja2.TemplateError for a template that is no Jinja, ValueError for a field of another type and for a
        template that is too long.
        """
        source = text
        if text is None and not other_templates(files.folder):
            source = _default(files.config.get("chat_template"))
        if source is None:
            return None
        if len(source) > MAX_SOURCE:
            raise ValueError(f"expected at most {MAX_SOURCE:,} characters, found {len(source):,}")
        return cls(source, files.special_tokens)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text with which the assistant's turn begins. Raises InvalidRequestError for what the template refuses."""
        try:
            return self._template.render(
                **self._special_tokens, messages=messages, tools=None, documents=None, add_generation_prompt=True
            )
        except Exception as error:  # a template can fail in any of Python's ways
            raise refusal(_reason(error)) from None


def template_file(directory: Path) -> Path | None:
    """The file of the template that chats are written with, or None."""
    files = (directory / TEMPLATE_FOLDER / f"{TEMPLATE_NAME}.jinja", directory / TEMPLATE_FILE)
    return next((file for file in files if file.exists()), None)


def other_templates(directory: Path) -> list[Path]:
    """Files of templates for something else, such as tools."""
    return sorted(file for file in (directory / TEMPLATE_FOLDER).glob("*.jinja") if file.stem != TEMPLATE_NAME)


def _default(templates: Any) -> str | None:
    """Some models have several named templates."""
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    if isinstance(templates, dict):
        templates = templates.get("default")
    if templates is not None and not isinstance(templates, str):
        raise ValueError(f"chat_template: expected a text, found {templates!r:.80}")
    return templates


def _reason(error: Exception) -> str:
    """One line. What the template itself says needs no name of an exception."""
    text = " ".join(str(error)[:_MAX_REASON_CHARACTERS].split())
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


@pass_context
def _as_it_is(context: Context, value: Any) -> Any:
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> NoReturn:
    raise TemplateError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)
