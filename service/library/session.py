"""The engine's process and all that turns texts into token ids, on one event loop: the server without HTTP.

Nothing here refuses for load: whoever sends more than the engine has slots for waits in the engine's own queue.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from service.api.generation.admission import Admission, Permit
from service.api.generation.chat_renderer import ChatRenderer
from service.api.generation.choice import Delta, Generation
from service.api.generation.run import Run, collected
from service.api.generation.sampling_defaults import SamplingDefaults
from service.api.generation.scaling_pass import Looked, look
from service.api.generation.tokenizer import ModelTokenizer
from service.api.generation.tool_forms import tool_form
from service.api.routes import chat as chat_route
from service.api.routes import generate as generate_route
from service.api.routes import openai as completion_route
from service.api.routes.compare import compared
from service.api.schemas.answers import CompareAnswer
from service.api.schemas.bodies import CompareBody, ScalingsBody
from service.api.schemas.openai import ChatBody, CompletionBody
from service.api.state import engine_options, form_limits, new_id
from service.api.structured_output.grammar_spec import GrammarSpecs
from service.client.engine_client import Client, EngineClient
from service.contract.engine_info import EngineInfo
from service.contract.errors import EngineLostError, RequestError, UnavailableError
from service.contract.request import GrammarSpec, Request, SamplingParams
from service.library.bodies import GenerateJob
from service.settings import Settings


class LocalCall:
    """One call in process: no client who may go away, no record, and no deadline but its own."""

    def __init__(self, service: Session, prefix: str, timeout: float | None = None) -> None:
        """`timeout` is in seconds from now."""
        self.id = new_id(prefix)
        self.service = service
        self.deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout

    def begin(self, sampling: SamplingParams | None, prompt_tokens: int | None = None) -> None:
        """Nobody keeps a record of it."""

    def admit(self, requests: Sequence[Request], *, continued: bool = False) -> AbstractContextManager[Permit]:
        return self.service.admission.admit(requests, asyncio.get_running_loop().time(), continued=continued)

    def deltas(self, generation: Generation) -> AsyncGenerator[list[Delta], None]:
        return generation.deltas(self.deadline)


class Session:
    """One loaded model. Everything but the constructor belongs on its event loop."""

    def __init__(self, settings: Settings, client: Client | None = None) -> None:
        self.settings = settings
        self.client: Client = EngineClient(timeout_seconds=settings.engine_timeout) if client is None else client
        self.admission = Admission(settings.max_num_seqs, sys.maxsize, sys.maxsize)
        self._chats: ChatRenderer | None = None
        self._forms: GrammarSpecs | None = None
        self._tokenizer: ModelTokenizer | None = None
        # Chats are rendered, and forms compiled, by one process each, which turns down who waits for too long there.
        self._turn = asyncio.Lock()

    async def start(self, on_progress: Callable[[str], None]) -> None:
        """Loads the model. Raises StartupError."""
        await self.client.start(engine_options(self.settings), on_progress)
        info = self.client.info
        self._chats = ChatRenderer(Path(info.tokenizer_path).parent, self.settings.max_body_bytes)
        self._forms = GrammarSpecs(info, form_limits(self.settings))
        self._tokenizer = ModelTokenizer(info, self._chats, SamplingDefaults.of(self.settings, info))

    async def close(self) -> None:
        """Ends the engine's process and the others; what still runs ends with UnavailableError."""
        await self.client.close()
        for process in (self._forms, self._chats):
            if process is not None:
                process.close()

    @property
    def info(self) -> EngineInfo:
        """The model, under its first name."""
        return replace(self.client.info, model=self.names[0])

    @property
    def names(self) -> list[str]:
        return self.settings.served_model_name or [self.client.info.model]

    @property
    def tokenizer(self) -> ModelTokenizer:
        assert self._tokenizer is not None, "started"
        return self._tokenizer

    @property
    def forms(self) -> GrammarSpecs:
        """The compiler of grammars for structured output."""
        assert self._forms is not None, "started"
        return self._forms

    @property
    def window(self) -> int:
        """The most prompts of one caller that are begun and not handed out: enough for the engine never to wait for
        prompts, although answers in order wait for the longest before them.
        """
        return 4 * self.client.info.max_num_seqs

    async def generate(self, job: GenerateJob) -> tuple[Run, dict[int, list[Delta]]]:
        """One prompt's run and the deltas of its choices. Raises RequestError, and EngineLostError."""
        with _explained():
            run = await self._run(job, LocalCall(self, "gen", job.body.timeout))
            return run, await collected(run)

    async def complete(self, body: CompletionBody) -> tuple[Run, dict[int, list[Delta]]]:
        """The same for the body of OpenAI's completions."""
        with _explained():
            async with self._turn:
                run = await completion_route.run_of(body, LocalCall(self, "cmpl", body.timeout))
            return run, await collected(run)

    async def converse(self, body: ChatBody) -> tuple[Run, dict[int, list[Delta]]]:
        """The same for the body of OpenAI's chat completions."""
        with _explained():
            async with self._turn:
                run = await chat_route.run_of(body, LocalCall(self, "chatcmpl", body.timeout))
            return run, await collected(run)

    async def scalings(self, body: ScalingsBody) -> tuple[str, Looked]:
        """An id, and the scaling pass over one text. Raises RequestError, and EngineLostError."""
        with _explained():
            call = LocalCall(self, "scal")
            return call.id, await look(body, call)

    async def chat_ids(self, body: ChatBody) -> list[int]:
        """A conversation as token ids, up to where the assistant goes on. Raises RequestError."""
        with _explained():
            async with self._turn:
                return await self.tokenizer.chat_ids(body.chat())

    async def compare(self, body: CompareBody) -> CompareAnswer:
        """One prompt under several gates. Raises RequestError, and EngineLostError."""
        with _explained():
            return await compared(body, LocalCall(self, "cmp", body.timeout))

    async def _run(self, job: GenerateJob, call: LocalCall) -> Run:
        body = job.body
        if job.chat is None and body.response_format is None:
            return await generate_route.run_of(body, call)
        async with self._turn:
            if job.chat is None:
                return await generate_route.run_of(body, call)
            prompt = await self.tokenizer.chat_ids(job.chat.chat())
            functions = job.chat.called
            if functions:
                form: GrammarSpec | None = await tool_form(self.forms, functions)
            else:
                form = await self.forms.of(body.response_format)
        called = [function.name for function in functions.values()]
        return Run(call, [prompt], body, body, logprobs=body.logprobs, form=form, called=called)


@contextmanager
def _explained() -> Iterator[None]:
    """Turns the errors of an engine that is gone into those of a process that has it for itself."""
    try:
        yield
    except RequestError as error:
        if error.code == "engine_dead":
            hint = "close this XLora and make another; what was not answered has to be asked again"
            raise EngineLostError(error.message, hint=hint) from None
        if error.code == "stopping":
            raise closed_error() from None
        raise


def closed_error() -> UnavailableError:
    """The error of whoever asks for something after the end."""
    return UnavailableError("this XLora has been closed", code="closed", hint="make another")
