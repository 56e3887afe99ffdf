"""Messages to text, by the tokenizer's own chat template.

The template is Jinja in a sandbox, with the same names in scope as transformers gives it (its apply_chat_template is
the oracle of the tests); transformers itself stays out of this process, and torch with it.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.errors import InvalidRequestError

_TEMPLATE_FILE = "chat_template.jinja"
_MAX_REASON_CHARACTERS = 300


def refusal(reason: str) -> InvalidRequestError:
    """The template cannot make a text of these messages."""
    return InvalidRequestError(f"the model's chat template does not take these messages: {reason}", param="messages")


class _Generation(Extension):
    """{% generation %} marks what a model is trained on; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own type)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Computes nothing while it compiles a template: `{{ 9 ** 9 ** 9 }}` would never be loaded."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)


class ChatTemplate:
    """One model's template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The template beside a tokenizer.json: a file of its own, or a field of tokenizer_config.json. None: no chat.

        Raises jinja2.TemplateError for a template that is no Jinja.
        """
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text("utf-8")) if path.exists() else {}
        file = directory / _TEMPLATE_FILE
        source = file.read_text("utf-8") if file.exists() else _default(config.get("chat_template"))
        if source is None:
            return None
        tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
        return cls(source, {name: token for name, token in tokens.items() if token is not None})

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text with which the assistant's turn begins. Raises InvalidRequestError for what the template refuses."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # a template can fail in any of Python's ways
            raise refusal(_reason(error)) from None


def _default(templates: Any) -> str | None:
    """Some models have several named templates."""
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}.get("default")
    return templates if isinstance(templates, str) else None


def _content(token: Any) -> str | None:
    """A special token is a string, or an object that has it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _reason(error: Exception) -> str:
    """One line. What the template itself says needs no name of an exception."""
    text = " ".join(str(error)[:_MAX_REASON_CHARACTERS].split())
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: Any) -> NoReturn:
    raise TemplateError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)
