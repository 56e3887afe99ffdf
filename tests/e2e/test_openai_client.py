"""The `openai` package against the real server and the demo: sync, async, streaming, and its errors."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest

from tests.support.server_process import Server

MESSAGES = [{"role": "user", "content": "Compute 48 + 87."}]
PROMPT = "What is 88 + 76? Which strand pairs with CTA TCT TAT?\n"
GREEDY = {"temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{demo_server.port}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        "demo",
        *(f"demo/{name}" for name in ("base", "math", "code", "bio", "tales")),
    ]
    assert client.models.retrieve("demo").owned_by == "xlora-service"


def test_chat_says_what_generate_says(client: openai.OpenAI, demo_server: Server) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_completion_tokens=40, **GREEDY)
    _, ours = demo_server.post("/generate", {"prompt": "Compute 48 + 87.\n", "max_tokens": 40, **GREEDY})
    assert "135" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.content == ours["outputs"][0]["text"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == ours["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == ours["usage"]["completion_tokens"]


def test_a_chat_stream_adds_up(client: openai.OpenAI) -> None:
    wishes = {"model": "demo", "messages": MESSAGES, "max_tokens": 40, "n": 2, "temperature": 0.8, "seed": 5}
    whole = client.chat.completions.create(**wishes, logprobs=True, top_logprobs=2)
    texts, usage, logprobs = ["", ""], None, 0
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        **wishes, logprobs=True, top_logprobs=2, stream=True, stream_options=options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert usage == whole.usage
    assert usage is not None
    assert logprobs == usage.completion_tokens


def test_scalings_through_extra_body(client: openai.OpenAI) -> None:
    """The gate hands over from `math` to `bio` in the middle of the answer; every chunk says who wrote it."""
    wishes = {"model": "demo", "prompt": PROMPT, "max_tokens": 54, **GREEDY}
    extra = {"xlora": {"return_scalings": "mean"}}
    whole = client.completions.create(**wishes, extra_body=extra).choices[0].xlora["scalings"]
    assert whole["experts"][0] == "math"
    stream = client.completions.create(**wishes, stream=True, extra_body=extra)
    rows = [row for chunk in stream for choice in chunk.choices for row in choice.xlora["scalings"]["mean"]]
    assert len(rows) == len(whole["mean"]) == 54
    for ours, theirs in zip(rows, whole["mean"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    leaders = [whole["experts"][max(range(4), key=row.__getitem__)] for row in rows]
    assert (leaders[5], leaders[-5]) == ("math", "bio")


def test_prompts_in_a_batch_are_answered_as_alone(client: openai.OpenAI) -> None:
    prompts = ["Compute 48 + 87.\n", "Compute 21 + 13.\n", PROMPT]
    wishes = {"model": "demo", "max_tokens": 30, "stop": ["."], **GREEDY}
    together = client.completions.create(prompt=prompts, **wishes)
    alone = [client.completions.create(prompt=prompt, **wishes).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone
    assert {choice.finish_reason for choice in together.choices} == {"stop"}


def test_asynchronously_and_many_at_once(demo_server: Server) -> None:
    async def run() -> None:
        url = f"http://127.0.0.1:{demo_server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:

            async def stream(number: int) -> str:
                message = {"role": "user", "content": f"Compute {number} + 31."}
                chunks = await client.chat.completions.create(
                    model="demo", messages=[message], max_tokens=40, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            numbers = range(20, 32)
            answers = await asyncio.gather(*(stream(number) for number in numbers))
            right = sum(str(number + 31) in answer for number, answer in zip(numbers, answers, strict=True))
            assert right >= 10, answers
            one = await client.completions.create(model="demo", prompt=PROMPT, max_tokens=3)
            assert one.usage is not None
            assert one.usage.completion_tokens == 3

    asyncio.run(run())


def test_leaving_a_stream_early(client: openai.OpenAI, demo_server: Server) -> None:
    with client.completions.create(model="demo", prompt=PROMPT, max_tokens=500, stream=True) as stream:
        next(iter(stream))
    message = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1)
    assert message.choices[0].finish_reason == "length"


class Animal(pydantic.BaseModel):
    """What `parse` asks for."""

    kind: Literal["hare", "owl"]
    legs: Annotated[int, pydantic.Field(ge=0, le=9)]
    tame: bool


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    """Whole and streamed, greedy and sampled: the demo knows no JSON, and says it all the same."""
    wishes = {"model": "demo", "messages": MESSAGES, "response_format": Animal, "max_completion_tokens": 80}
    for sampling in (GREEDY, {"seed": 3, "temperature": 1.2}):
        choice = client.chat.completions.parse(**wishes, **sampling).choices[0]
        assert isinstance(choice.message.parsed, Animal)
        assert choice.finish_reason == "stop"
        with client.chat.completions.stream(**wishes, **sampling) as stream:
            stream.until_done()
            assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed


class Tale(pydantic.BaseModel):
    """As most models are: nothing is said of how long its texts are."""

    title: str
    years: list[int]


def test_parse_has_an_end_where_a_model_closes_no_string(client: openai.OpenAI) -> None:
    wishes = {"model": "demo", "messages": MESSAGES, "response_format": Tale, "max_completion_tokens": 1500}
    choice = client.chat.completions.parse(**wishes, **GREEDY).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.parsed is not None
    assert len(choice.message.parsed.title) == 1024


def test_a_form_is_the_same_on_every_route(client: openai.OpenAI, demo_server: Server) -> None:
    form = {"type": "regex", "pattern": "Sum: [0-9]{1,4}\\."}
    text = client.completions.create(
        model="demo", prompt="Compute 48 + 87.\n", extra_body={"response_format": form}, **GREEDY
    )
    _, ours = demo_server.post("/generate", {"prompt": "Compute 48 + 87.\n", "response_format": form, **GREEDY})
    assert ours["outputs"][0]["text"] == text.choices[0].text
    assert re.fullmatch(form["pattern"], text.choices[0].text)
    assert ours["outputs"][0]["finish_reason"] == "stop"
    _, stopped = demo_server.post("/generate", {"prompt": "a", "response_format": form, "stop": ":", **GREEDY})
    assert (stopped["outputs"][0]["text"], stopped["outputs"][0]["finish_reason"]) == ("Sum", "stop")


def tool(name: str, parameters: type[pydantic.BaseModel] | None = None) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "description": "As it says.", "strict": True}
    if parameters is not None:
        function["parameters"] = parameters.model_json_schema()
    return {"type": "function", "function": function}


class Herd(pydantic.BaseModel):
    """Of a kind, with a definition of its own."""

    animals: Annotated[list[Animal], pydantic.Field(min_length=1, max_length=2)]


TOOLS = [tool("tame"), tool("animal", Animal), tool("herd", Herd)]
MODELS = {"animal": Animal, "herd": Herd}


def calls_of(stream: Any) -> list[tuple[str, str, str | None]]:
    """Name, arguments and end of every choice's call, as deltas are put together."""
    found: dict[int, list[Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            call = found.setdefault(choice.index, ["", "", None])
            for delta in choice.delta.tool_calls or ():
                assert delta.index == 0
                assert (delta.id is not None) == (delta.function.name is not None) == (call[0] == "")
                call[0] += delta.function.name or ""
                call[1] += delta.function.arguments
            assert not choice.delta.content
            call[2] = choice.finish_reason
    return [tuple(found[index]) for index in sorted(found)]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "herd"}}, "stop")],
)
def test_tools_are_called(client: openai.OpenAI, choice: Any, reason: str) -> None:
    """Whole and streamed, in several choices; and the call goes back in with its result."""
    called = set()
    for seed in range(5):
        wishes = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "n": 3, "seed": seed}
        whole = client.chat.completions.create(**wishes, temperature=1.5)
        streamed = calls_of(client.chat.completions.create(**wishes, temperature=1.5, stream=True))
        for one, told in zip(whole.choices, streamed, strict=True):
            [call] = one.message.tool_calls or ()
            assert (call.function.name, call.function.arguments, one.finish_reason) == told
            assert (one.message.content, one.finish_reason) == (None, reason)
            if call.function.name in MODELS:
                MODELS[call.function.name].model_validate_json(call.function.arguments)
            else:
                assert json.loads(call.function.arguments) == {}
            called.add(call.function.name)
    assert called == ({"tame", "animal", "herd"} if choice == "required" else {"herd"})
    message = whole.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    history: list[Any] = [*MESSAGES, message.model_dump(), result]
    parsed = client.chat.completions.parse(model="demo", messages=history, tools=TOOLS, tool_choice=choice, **GREEDY)
    history += [parsed.choices[0].message.model_dump(), {**result, "content": [{"type": "text", "text": "x"}]}]
    assert client.chat.completions.create(model="demo", messages=history, max_tokens=3).choices[0].message.content


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS)
    assert (refused.value.param, "required" in refused.value.message) == ("tool_choice", True)
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="demo", prompt="a", extra_body={"best": 1})
    assert (unknown.value.code, unknown.value.type) == ("unknown_field", "invalid_request_error")


def test_a_request_id_comes_back(client: openai.OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        model="demo", prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert answer.headers["x-request-id"] == "mine"
    assert answer.parse()._request_id == "mine"


def test_ten_turns_by_model_dump(client: openai.OpenAI) -> None:
    """Answers go back in with all that the client's types have: whole, parsed, and gathered from a stream."""
    messages: list[Any] = []
    for turn in range(10):
        messages.append({"role": "user", "content": f"Compute {turn + 20} + 31.", "name": None})
        wishes = {"model": "demo", "messages": messages, "max_completion_tokens": 40, "stop": ".", **GREEDY}
        if turn % 3 == 0:
            message = client.chat.completions.create(**wishes).choices[0].message
        elif turn % 3 == 1:
            message = client.chat.completions.parse(**wishes).choices[0].message
        else:
            with client.chat.completions.stream(**wishes) as stream:
                stream.until_done()
                message = stream.get_final_completion().choices[0].message
        assert message.content
        messages.append(message.model_dump())
    assert {"tool_calls", "refusal", "audio", "annotations", "function_call"} <= set(messages[-1])


@pytest.mark.parametrize("logprobs", [0, 2])
def test_an_echo_alone_is_scored_as_it_is_beside_a_completion(client: openai.OpenAI, logprobs: int) -> None:
    wishes = {"model": "demo", "prompt": ["Compute 48 + 87.\n", PROMPT], "echo": True, "logprobs": logprobs, **GREEDY}
    alone, beside = (client.completions.create(**wishes, max_tokens=tokens).choices for tokens in (0, 1))
    for ours, theirs in zip(alone, beside, strict=True):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert (ours.text, ours.finish_reason) == (theirs.text[: len(ours.text)], "length")
        assert ours.logprobs.tokens == theirs.logprobs.tokens[:-1]
        assert ours.logprobs.token_logprobs == pytest.approx(theirs.logprobs.token_logprobs[:-1], abs=1e-4)
        assert [len(one or ()) for one in ours.logprobs.top_logprobs or ()] == [
            len(one or ()) for one in (theirs.logprobs.top_logprobs or ())[:-1]
        ]


def test_an_empty_prompt_begins_a_text(client: openai.OpenAI, demo_server: Server) -> None:
    """As the token that begins every text does."""
    wishes = {"model": "demo", "max_tokens": 8, **GREEDY}
    text, ids = (client.completions.create(prompt=prompt, **wishes).choices[0].text for prompt in ("", [0]))
    assert text == ids
    _, ours = demo_server.post("/generate", {"prompt": "", "max_tokens": 8, **GREEDY})
    assert (ours["outputs"][0]["text"], ours["usage"]["prompt_tokens"]) == (text, 1)
    single = client.completions.create(model="demo", prompt="", echo=True, max_tokens=0, logprobs=1).choices[0]
    assert (single.text, single.logprobs and single.logprobs.token_logprobs) == ("", [None])


def test_a_special_token_stops(client: openai.OpenAI) -> None:
    """Whether or not it is the end of text to the model, whose greedy answer ends with it."""
    wishes = {"model": "demo", "messages": MESSAGES, "max_tokens": 200, **GREEDY}
    ended = client.chat.completions.create(**wishes).choices[0]
    stopped = client.chat.completions.create(**wishes, stop=["</s>"], extra_body={"ignore_eos": True}).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == (ended.finish_reason, ended.message.content)
    assert stopped.finish_reason == "stop"
