"""XLora: a model in process, for notebooks and scripts.

The engine runs in a process of its own, as the server has it, and is driven from a thread of ours: methods may be
called from any thread, also beside a running event loop. Fields, checks and errors are those of the HTTP routes.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from rich.console import Console

from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError, RequestError
from service.library.answers import Answer, Comparison, TextScalings, answer_of, comparison_of, text_scalings_of
from service.library.bodies import (
    Prompt,
    check_many,
    compare_body,
    count_of,
    fields_of,
    generate_job,
    is_one_prompt,
    scalings_body,
    scalings_field,
)
from service.library.feed import as_they_come, asynchronously, in_order
from service.library.loop_thread import LoopThread
from service.library.progress import watched
from service.library.session import Session, closed_error
from service.library.settings import check_settings
from service.library.table import Answers, By, data_frame, rows
from service.library.tokenizer import Tokenizer
from service.settings import load_settings

_T = TypeVar("_T")
_Single = str | Sequence[int] | Mapping[str, Any]
_Settings = Sequence[Mapping[str, Any]]
_Work = Callable[[int, Prompt], Coroutine[Any, Any, _T]]


class XLora:
    """A loaded X-LoRA model.

        with XLora("my-model") as model:
            for answer in model.generate(prompts, temperature=0, scalings="mean", progress=True):
                print(answer.text, answer.scalings)  # NumPy [T, E]

    `generate`, `chat`, `scalings` and `compare` take one prompt and return its answer, or any iterable of prompts and
    return an iterator of their answers: prompts are pulled as there is room, so that memory stays flat. Nothing is
    refused for load. Ctrl-C, an error, or leaving an iterator early aborts what it has in flight.

    Their fields are those of the HTTP routes. They raise InvalidRequestError for what can never succeed (message,
    `param` and `hint` as over HTTP), TimedOutError where a `timeout` (seconds from when the prompt's turn comes) has
    passed before the first token, EngineLostError where the engine's process is gone, and UnavailableError after
    `close`.
    """

    def __init__(self, model: str, *, progress: bool = True, **settings: Any) -> None:
        """Loads a model: a directory, or a hub id. It takes seconds; `progress` says on stderr how far it is.

        `settings` are those of the command line, as device="cuda", dtype, max_num_seqs or kv_memory="2GiB"; XLORA_*
        variables hold as they do there. Raises SettingsError, CheckpointError and StartupError.
        """
        check_settings(settings)
        self._session = Session(load_settings({"model": str(model), **settings}))
        self._loop = LoopThread(closed_error)
        self._finalizer = weakref.finalize(self, self._loop.close, self._session.close)
        try:
            console = Console(stderr=True, quiet=not progress)
            if console.is_terminal:
                with console.status(f"loading {model}") as status:
                    self._loop.run(self._session.start(lambda text: status.update(text)))
            else:
                self._loop.run(self._session.start(lambda text: None))
        except BaseException:
            self.close()
            raise

    @overload
    def generate(self, prompts: _Single, **fields: Any) -> Answer: ...
    @overload
    def generate(self, prompts: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        """Messages of one chat, or many objects of fields: their keys tell, and not their type."""

    @overload
    def generate(
        self, prompts: Iterable[Prompt], *, return_exceptions: Literal[False] = ..., **fields: Any
    ) -> Iterator[Answer]: ...
    @overload
    def generate(
        self, prompts: Iterable[Prompt], *, return_exceptions: bool, **fields: Any
    ) -> Iterator[Answer | RequestError]: ...
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        scalings: str | None = None,
        progress: bool = False,
        in_order: bool = True,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """Continues a prompt (Answer), or any number of them (an iterator of Answer).

        A prompt is a text, token ids, messages of a chat, or an object of fields that hold for it alone, as
        {"prompt": "...", "max_tokens": 20}. `scalings` is "none", "mean" ([T, E]) or "full" ([T, S, E]), as
        return_scalings. `fields` are those of POST /generate; with messages also tools, tool_choice,
        chat_template_kwargs, add_generation_prompt and continue_final_message of OpenAI's chats.

        With in_order=False answers come as they are there; their `index` says whose they are. With
        return_exceptions=True a prompt that fails yields its RequestError in its place, which has a `prompt_index`, and
        the others go on.
        """
        common = scalings_field(fields, scalings)
        work = functools.partial(self._generate, common)
        return self._one_or_many(prompts, work, "prompts", progress, in_order, return_exceptions)

    async def agenerate(
        self,
        prompts: Prompt | Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        scalings: str | None = None,
        in_order: bool = True,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> AsyncGenerator[Answer]:
        """The same on the caller's event loop, always an asynchronous iterator: `async for answer in ...`.

        Prompts may come from an asynchronous iterable as well.
        """
        common = scalings_field(fields, scalings)
        many: Any = [prompts] if is_one_prompt(prompts) else prompts
        check_many(many)
        begin = self._numbered(functools.partial(self._generate, common), return_exceptions)
        answers = asynchronously(begin, many, self._session.window, ordered=in_order)
        async for answer in answers:
            yield answer

    def chat(self, messages: Sequence[Mapping[str, Any]], *, scalings: str | None = None, **fields: Any) -> Answer:
        """The answer to one conversation, by the model's chat template. `fields` are those of `generate`."""
        answer: Answer = self.generate({"messages": messages}, scalings=scalings, **fields)
        return answer

    @overload
    def scalings(self, texts: _Single, scalings: str | None = None, **fields: Any) -> TextScalings: ...
    @overload
    def scalings(
        self,
        texts: Iterable[Prompt],
        scalings: str | None = None,
        *,
        return_exceptions: Literal[False] = ...,
        **fields: Any,
    ) -> Iterator[TextScalings]: ...
    @overload
    def scalings(
        self, texts: Iterable[Prompt], scalings: str | None = None, *, return_exceptions: bool, **fields: Any
    ) -> Iterator[TextScalings | RequestError]: ...
    def scalings(
        self,
        texts: _Single | Iterable[Prompt],
        scalings: str | None = None,
        *,
        progress: bool = False,
        in_order: bool = True,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """The gate over a text (TextScalings), or any number of them (an iterator), without generating.

        `scalings` is "mean" ([T, E], when absent) or "full" ([T, S, E]). `fields` are those of POST /scalings: select,
        granularity, perplexity, scalings_dtype.
        """
        common = scalings_field(fields, scalings)
        work = functools.partial(self._scalings, common)
        return self._one_or_many(texts, work, "texts", progress, in_order, return_exceptions)

    @overload
    def compare(self, prompts: _Single, settings: _Settings | None = None, **fields: Any) -> Comparison: ...
    @overload
    def compare(
        self,
        prompts: Iterable[Prompt],
        settings: _Settings | None = None,
        *,
        return_exceptions: Literal[False] = ...,
        **fields: Any,
    ) -> Iterator[Comparison]: ...
    @overload
    def compare(
        self, prompts: Iterable[Prompt], settings: _Settings | None = None, *, return_exceptions: bool, **fields: Any
    ) -> Iterator[Comparison | RequestError]: ...
    def compare(
        self,
        prompts: _Single | Iterable[Prompt],
        settings: _Settings | None = None,
        *,
        scalings: str | None = None,
        progress: bool = False,
        in_order: bool = True,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """A prompt under up to eight settings (Comparison), or any number of prompts (an iterator).

        `settings` are as in POST /compare: [{}, {"label": "base", "experts": {"only": []}}]. `fields` are its others.
        """
        common = scalings_field(fields, scalings) | ({} if settings is None else {"settings": settings})
        work = functools.partial(self._compare, common)
        return self._one_or_many(prompts, work, "prompts", progress, in_order, return_exceptions)

    @property
    def tokenizer(self) -> Tokenizer:
        """Between texts and token ids, as prompts are read."""
        return Tokenizer(self._session, self._loop)

    @property
    def info(self) -> EngineInfo:
        """The model: experts, sites, the whole X-LoRA configuration, limits."""
        return self._session.info

    @staticmethod
    def rows(answers: Answers, by: By = "token") -> Iterator[dict[str, Any]]:
        """Answers of `generate` or `scalings` as one dictionary per token, or per text with by="text"."""
        return rows(answers, by)

    @staticmethod
    def table(answers: Answers, by: By = "token") -> Any:
        """The same as a pandas.DataFrame. Raises StartupError where pandas is not installed."""
        return data_frame(answers, by)

    def close(self) -> None:
        """Ends the engine's process and frees its memory. What still runs ends with UnavailableError."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate(self, common: Mapping[str, Any], index: int, prompt: Prompt) -> Answer:
        job = generate_job(fields_of(prompt, common))
        run, deltas = await self._session.generate(job)
        return answer_of(index, run, deltas, job.body.scalings_dtype)

    async def _scalings(self, common: Mapping[str, Any], index: int, text: Prompt) -> TextScalings:
        body = scalings_body(fields_of(text, common))
        id, looked = await self._session.scalings(body)
        session = self._session  # arrays of a long text take time, and other prompts share the loop
        return await asyncio.to_thread(
            text_scalings_of, index, id, looked, session.tokenizer, session.info, body.scalings_dtype
        )

    async def _compare(self, common: Mapping[str, Any], index: int, prompt: Prompt) -> Comparison:
        document = await self._session.compare(compare_body(fields_of(prompt, common)))
        return comparison_of(index, document, self._session.info)

    def _one_or_many(
        self,
        prompts: Any,
        work: _Work[_T],
        unit: str,
        progress: bool,
        is_ordered: bool,
        return_exceptions: bool,
    ) -> _T | Iterator[_T]:
        if is_one_prompt(prompts):
            if return_exceptions:
                raise InvalidRequestError(
                    "return_exceptions goes with many prompts", param="return_exceptions", hint="catch the RequestError"
                )
            return self._loop.run(work(0, prompts))
        check_many(prompts)
        deliver = in_order if is_ordered else as_they_come
        answers: Iterator[Any] = deliver(self._numbered(work, return_exceptions), prompts, self._session.window)
        return watched(answers, unit, count_of(prompts)) if progress else answers

    def _numbered(self, work: _Work[_T], return_exceptions: bool) -> Callable[[Prompt], Future[_T]]:
        """A function that begins the work on the next prompt. It keeps the model from being collected meanwhile."""
        started = 0

        async def guarded(index: int, prompt: Prompt) -> Any:
            try:
                return await work(index, prompt)
            except RequestError as error:
                error.prompt_index = index
                if return_exceptions:
                    return error
                error.add_note(f"this was prompt {index}, counted from 0")
                raise

        def begin(prompt: Prompt) -> Future[_T]:
            nonlocal started
            started += 1
            return self._loop.submit(guarded(started - 1, prompt))

        return begin
