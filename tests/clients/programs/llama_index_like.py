"""llama-index with OpenAILike, told that the model chats and calls functions."""

from __future__ import annotations

import pydantic
from features import QUESTION, address, came_in_pieces, run, says_something
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


class Animal(pydantic.BaseModel):
    """What is asked for."""

    kind: str
    legs: int
    names: list[str]


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def main() -> None:
    where = {"model": "demo", "api_base": address(), "api_key": "unused", "context_window": 8192}
    model = OpenAILike(**where, is_chat_model=True, is_function_calling_model=True)

    def chat() -> None:
        says_something(model.chat([ChatMessage(QUESTION)]).message.content)
        says_something(OpenAILike(**where).complete(f"{QUESTION}\n").text)  # /v1/completions

    def streaming() -> None:
        came_in_pieces([str(piece.delta) for piece in model.stream_chat([ChatMessage(QUESTION)])])

    def structured() -> None:
        assert isinstance(model.structured_predict(Animal, PromptTemplate(QUESTION)), Animal)
        assert isinstance(model.as_structured_llm(Animal).complete(QUESTION).raw, Animal)

    def tool_call() -> None:
        answer = model.chat_with_tools([FunctionTool.from_defaults(add)], QUESTION, tool_required=True)
        [call] = model.get_tool_calls_from_response(answer)
        assert call.tool_name == "add"
        assert {type(value) for value in call.tool_kwargs.values()} == {int}
        assert call.tool_kwargs.keys() == {"a", "b"}

    run({"chat": chat, "streaming": streaming, "structured answer": structured, "tool call": tool_call})


if __name__ == "__main__":
    main()
