"""Messages to text, by the tokenizer's own chat template.

The template is Jinja in a sandbox, with the same names in scope as transformers gives it (its apply_chat_template is
the oracle of the tests); transformers itself stays out of this process, and torch with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
CHAT, TOOLS = "default", "tool_use"  # of several templates by name, those for chats and for chats with tools
MAX_SOURCE = 100_000  # characters of a template; the longest in use have 30,000, and compiling 100,000 takes seconds
_MAX_REASON_CHARACTERS = 300
_END_OF_CONTENT = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers has it; the space tells whether the template trims


def refusal(reason: str) -> InvalidRequestError:
    """The template cannot make a text of these messages."""
    return InvalidRequestError(f"the model's chat template does not take these messages: {reason}", param="messages")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and how it is to be written."""

    messages: list[dict[str, Any]]  # the arguments of tool calls may be JSON text: templates see what it says
    tools: list[dict[str, Any]] | None = None  # in OpenAI's form
    add_generation_prompt: bool = True  # the text goes on to where the assistant begins
    continue_final_message: bool = False  # the text ends with the last message's content, as if it were unfinished
    variables: dict[str, Any] = field(default_factory=dict)  # more names for the template


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

    def __init__(self, source: str, special_tokens: dict[str, str], tool_source: str | None = None) -> None:
        """`tool_source` is the template of chats with tools, where that is another."""
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
        self._tool_template = self._template if tool_source is None else environment.from_string(tool_source)
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The template beside a tokenizer.json: a file of its own, or a field of tokenizer_config.json. None: no chat.

        Raises jinja2.TemplateError for a template that is no Jinja; loading a checkpoint has refused those before.
        """
        texts = {name: path.read_text("utf-8") for name, path in template_files(directory).items()}
        return cls.of(TokenizerFiles.read(directory), texts)

    @classmethod
    def of(cls, files: TokenizerFiles, texts: Mapping[str, str]) -> ChatTemplate | None:
        """The same from what the files hold; `texts` are those of `template_files`. Where there is any, the field of
        tokenizer_config.json does not count, also where none of them is the one for chats.

        Raises jinja2.TemplateError for a template that is no Jinja, ValueError for a field of another type and for a
        template that is too long.
        """
        named = dict(texts) or _named(files.config.get("chat_template"))
        source, tool_source = (_checked(named.get(name)) for name in (CHAT, TOOLS))
        return None if source is None else cls(source, files.special_tokens, tool_source)

    def render(self, chat: Chat) -> str:
        """The text that the assistant goes on with. Raises InvalidRequestError for what the template refuses."""
        template = self._template if chat.tools is None else self._tool_template
        values = {
            **self._special_tokens,
            "documents": None,
            **chat.variables,
            "messages": list(map(_with_objects, _marked(chat) if chat.continue_final_message else chat.messages)),
            "tools": chat.tools,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        try:
            text = template.render(values)
        except Exception as error:  # a template can fail in any of Python's ways
            raise refusal(_reason(error)) from None
        return _cut(text, str(chat.messages[-1]["content"])) if chat.continue_final_message else text


def template_files(directory: Path) -> dict[str, Path]:
    """Templates in files of their own, by name."""
    named = {file.stem: file for file in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    single = directory / TEMPLATE_FILE
    return {CHAT: single, **named} if single.exists() else named


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have objects as arguments, as templates expect them."""
    if not message.get("tool_calls"):
        return message
    functions = [(call, call["function"]) for call in message["tool_calls"]]
    calls = [
        {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}
        for call, function in functions
    ]
    return {**message, "tool_calls": calls}


def _arguments(arguments: Any) -> Any:
    """Return the object or list that a JSON text is; else the text itself, as of a call that was cut off."""
    try:
        found = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict | list) else arguments


def _marked(chat: Chat) -> list[dict[str, Any]]:
    """The messages with a mark at the end of the last one's content, as transformers finds where it ends."""
    *others, last = chat.messages
    return [*others, {**last, "content": f"{last['content']}{_END_OF_CONTENT}"}]


def _cut(text: str, content: str) -> str:
    """A text up to the mark; a template that trims contents has trimmed the unmarked one as well."""
    mark = _END_OF_CONTENT.strip()
    if mark not in text or content.strip() not in text:
        raise refusal("continue_final_message: the last message's content is not in the text as it is")
    end = text.rindex(mark)
    return text[:end] if text.startswith(_END_OF_CONTENT, end) else text[:end].rstrip()


def _named(templates: Any) -> dict[str, Any]:
    """Some models have several templates, by name."""
    if isinstance(templates, list):
        return {entry["name"]: entry["template"] for entry in templates}
    return templates if isinstance(templates, dict) else {CHAT: templates}


def _checked(source: Any) -> str | None:
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"chat_template: expected a text, found {source!r:.80}")
    if len(source) > MAX_SOURCE:
        raise ValueError(f"expected at most {MAX_SOURCE:,} characters, found {len(source):,}")
    return source


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
