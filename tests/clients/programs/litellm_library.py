"""litellm as a library."""

from __future__ import annotations

from typing import Any

import litellm
import pydantic
from features import QUESTION, address, came_in_pieces, run, says_something

MESSAGES = [{"role": "user", "content": QUESTION}]


class Animal(pydantic.BaseModel):
    """What is asked for."""

    kind: str
    legs: int
    names: list[str]


TOOL = {"type": "function", "function": {"name": "describe", "parameters": Animal.model_json_schema()}}


def ask(messages: list[Any] = MESSAGES, **more: Any) -> Any:
    return litellm.completion("openai/demo", messages, api_base=address(), api_key="unused", **more)


def chat() -> None:
    says_something(ask().choices[0].message.content)


def streaming() -> None:
    came_in_pieces([chunk.choices[0].delta.content or "" for chunk in ask(stream=True)])


def structured() -> None:
    Animal.model_validate_json(ask(response_format=Animal).choices[0].message.content)


def tool_call() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "describe"}}):
        message = ask(tools=[TOOL], tool_choice=choice).choices[0].message
        [call] = message.tool_calls
        Animal.model_validate_json(call.function.arguments)
        chunks = list(ask(tools=[TOOL], tool_choice=choice, stream=True))
        whole = litellm.stream_chunk_builder(chunks)
        Animal.model_validate_json(whole.choices[0].message.tool_calls[0].function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        assert ask([*MESSAGES, message.model_dump(), result], max_tokens=5).choices


if __name__ == "__main__":
    run({"chat": chat, "streaming": streaming, "structured answer": structured, "tool call": tool_call})
