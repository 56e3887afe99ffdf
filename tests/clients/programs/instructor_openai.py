"""instructor in its default mode, which asks for structured answers as tool calls."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pydantic
from features import QUESTION, address, came_in_pieces, run, says_something

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


class Animal(pydantic.BaseModel):
    """What is asked for."""

    kind: str
    legs: int
    names: list[str]


def main() -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=address(), api_key="unused"))
    ask: Any = client.chat.completions

    def chat() -> None:
        answer = ask.create(model="demo", messages=MESSAGES, response_model=None)
        says_something(answer.choices[0].message.content)

    def streaming() -> None:
        stream = ask.create(model="demo", messages=MESSAGES, response_model=None, stream=True)
        came_in_pieces([chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices])

    def structured() -> None:
        """Whole, and growing."""
        assert isinstance(ask.create(model="demo", messages=MESSAGES, response_model=Animal, max_retries=0), Animal)
        *_, last = ask.create_partial(model="demo", messages=MESSAGES, response_model=Animal)
        Animal.model_validate(last.model_dump())

    run({"chat": chat, "streaming": streaming, "structured answer": structured, "tool call": structured})


if __name__ == "__main__":
    main()
