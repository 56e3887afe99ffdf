"""pydantic-ai's agents; `output_type` is a tool call to them."""

from __future__ import annotations

import asyncio

import pydantic
from features import QUESTION, address, came_in_pieces, run, says_something
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Animal(pydantic.BaseModel):
    """What is asked for."""

    kind: str
    legs: int
    names: list[str]


def main() -> None:
    model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=address(), api_key="unused"))

    def chat() -> None:
        says_something(Agent(model).run_sync(QUESTION).output)

    def streaming() -> None:
        async def pieces() -> list[str]:
            async with Agent(model).run_stream(QUESTION) as answer:
                return [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]

        came_in_pieces(asyncio.run(pieces()))

    def structured() -> None:
        async def streamed() -> Animal:
            async with Agent(model, output_type=Animal).run_stream(QUESTION) as answer:
                return await answer.get_output()

        assert isinstance(Agent(model, output_type=Animal, retries=0).run_sync(QUESTION).output, Animal)
        assert isinstance(asyncio.run(streamed()), Animal)

    def tool_call() -> None:
        """The model chooses between a tool and the answer, and in the end it has answered: a tool may be called again
        and again by a model that has learned of none.
        """
        agent = Agent(model, output_type=Animal, retries=0)
        calls: list[int] = []

        @agent.tool_plain
        def legs(kind: int) -> int:
            calls.append(kind)
            return 4

        for _ in range(10):
            assert isinstance(agent.run_sync(QUESTION).output, Animal)
        assert calls, "the tool was never called"

    run({"chat": chat, "streaming": streaming, "structured answer": structured, "tool call": tool_call})


if __name__ == "__main__":
    main()
