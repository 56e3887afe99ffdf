"""The `openai` package, whichever version: chats, structured answers, tool calls, and a history of ten turns."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
from features import QUESTION, address, came_in_pieces, run, says_something

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


class Animal(pydantic.BaseModel):
    kind: str
    legs: int
    names: list[str]


TOOL = {
    "type": "function",
    "function": {"name": "describe", "description": "Describes one.", "parameters": Animal.model_json_schema()},
}


class Client:
    """Every feature, through one client."""

    def __init__(self, url: str, key: str) -> None:
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)

    def chat(self) -> None:
        answer = self._client.chat.completions.create(model="demo", messages=MESSAGES)
        says_something(answer.choices[0].message.content)

    def streaming(self) -> None:
        stream = self._client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        came_in_pieces([chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices])

    def structured(self) -> None:
        answer = self._client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Animal)
        assert isinstance(answer.choices[0].message.parsed, Animal)

    def tool_call(self) -> None:
        """Required and named, whole and streamed; the result goes back in."""
        for choice in ("required", {"type": "function", "function": {"name": "describe"}}):
            wishes: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "tools": [TOOL]}
            wishes["tool_choice"] = choice
            message = self._client.chat.completions.create(**wishes).choices[0].message
            [call] = message.tool_calls
            Animal.model_validate_json(call.function.arguments)
            pieces = [
                delta.function.arguments or ""
                for chunk in self._client.chat.completions.create(**wishes, stream=True)
                for one in chunk.choices
                for delta in one.delta.tool_calls or ()
            ]
            Animal.model_validate(json.loads("".join(pieces)))
            result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
            history = [*MESSAGES, message.model_dump(), result]
            assert self._client.chat.completions.create(model="demo", messages=history, max_tokens=5).choices

    def history(self) -> None:
        """Ten turns, each answer put back in as it is; every third is parsed or streamed."""
        messages: list[Any] = []
        for turn in range(10):
            messages.append({"role": "user", "content": f"Compute {turn + 20} + 31."})
            wishes: dict[str, Any] = {"model": "demo", "messages": messages, "stop": ".", "temperature": 0}
            if turn % 3 == 0:
                message = self._client.chat.completions.create(**wishes).choices[0].message
            elif turn % 3 == 1:
                message = self._client.chat.completions.parse(**wishes).choices[0].message
            else:
                with self._client.chat.completions.stream(**wishes) as stream:
                    stream.until_done()
                    message = stream.get_final_completion().choices[0].message
            messages.append(message.model_dump())
        assert len(messages) == 20


def features(url: str, key: str = "unused") -> dict[str, Any]:
    client = Client(url, key)
    return {
        "chat": client.chat,
        "streaming": client.streaming,
        "structured answer": client.structured,
        "tool call": client.tool_call,
        "ten turns": client.history,
    }


if __name__ == "__main__":
    run(features(address()))
