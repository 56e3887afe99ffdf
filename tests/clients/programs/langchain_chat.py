"""langchain-openai's ChatOpenAI."""

from __future__ import annotations

import pydantic
from features import QUESTION, address, came_in_pieces, run, says_something
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


class Animal(pydantic.BaseModel):
    """What is asked for."""

    kind: str
    legs: int
    names: list[str]


class Add(pydantic.BaseModel):
    """Adds."""

    a: int
    b: int


def main() -> None:
    model = ChatOpenAI(model="demo", base_url=address(), api_key="unused", max_retries=0)

    def chat() -> None:
        says_something(str(model.invoke(QUESTION).content))

    def streaming() -> None:
        came_in_pieces([str(chunk.content) for chunk in model.stream(QUESTION)])

    def structured() -> None:
        """By its default, by function calling, and as a stream."""
        assert isinstance(model.with_structured_output(Animal).invoke(QUESTION), Animal)
        called = model.with_structured_output(Animal, method="function_calling")
        assert isinstance(called.invoke(QUESTION), Animal)
        *_, last = model.with_structured_output(Animal).stream(QUESTION)
        assert isinstance(last, Animal)

    def tool_call() -> None:
        for choice in ("any", "Add"):
            bound = model.bind_tools([Add], tool_choice=choice)
            message = bound.invoke(QUESTION)
            Add.model_validate(message.tool_calls[0]["args"])
            whole = None
            for chunk in bound.stream(QUESTION):
                whole = chunk if whole is None else whole + chunk
            assert whole is not None
            Add.model_validate(whole.tool_calls[0]["args"])
            result = ToolMessage("135", tool_call_id=message.tool_calls[0]["id"])
            assert model.invoke([HumanMessage(QUESTION), message, result], max_tokens=5).content

    run({"chat": chat, "streaming": streaming, "structured answer": structured, "tool call": tool_call})


if __name__ == "__main__":
    main()
