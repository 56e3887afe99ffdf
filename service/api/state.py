"""The state that the routes share: the engine's client, the tokenizer, the metrics, and how far the start has come."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from fastapi import Request as HttpRequest

from service.api.gate_views.scalings_log import ScalingsLog
from service.api.generation.admission import Admission
from service.api.generation.chat_renderer import ChatRenderer
from service.api.generation.sampling_defaults import SamplingDefaults
from service.api.generation.tokenizer import ModelTokenizer
from service.api.middleware.keys import Keys
from service.api.structured_output.grammar_spec import GrammarSpecs
from service.client.engine_client import Client
from service.contract.checks import stored_settings
from service.contract.engine_info import EngineInfo
from service.contract.errors import EngineLostError, RequestError, StartupError, UnavailableError
from service.contract.options import EngineOptions
from service.contract.output import StepStats
from service.contract.request import FormLimits, Request, SamplingParams
from service.contract.steering import GateSettings
from service.observability.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger("xlora")

_WARM_UP_TOKENS = 4
_WARM_UP_PROMPT = 8  # tokens: the first step then says how long a full one may take (client/progress.py)


class Service:
    """One per application. Loading begins with the server, so that the probes answer from the first moment."""

    def __init__(self, client: Client, settings: Settings, metrics: Metrics) -> None:
        self.client = client
        self.settings = settings
        self.metrics = metrics
        self.keys: list[Keys] = []  # callers' and admins', which the middleware asks
        self.scrape: Callable[[], Awaitable[bytes]] = self._own_metrics  # what /metrics answers
        self.started_at = time.monotonic()
        self.sampling_defaults = SamplingDefaults()
        self.loaded_at = 0  # seconds since 1970
        self.draining = False  # told to stop: no longer ready
        self.refusing = False  # what runs may end, nothing new begins
        self.error: StartupError | EngineLostError | None = None  # why the process must end
        self.admission = Admission(settings.max_num_seqs, settings.max_waiting, settings.max_queued_tokens)
        self._info: tuple[EngineInfo, EngineInfo] | None = None  # the engine's, and the same under the served name
        self._tokenizer: ModelTokenizer | None = None
        self._gate: GateSettings | None = None
        self._scalings_log: ScalingsLog | None = None
        self._forms: GrammarSpecs | None = None
        self._chats: ChatRenderer | None = None
        metrics.watch(lambda: self.state, settings.wanted_replicas)

    @property
    def state(self) -> str:
        """One of observability's STATES. Only ok is ready; stalled and draining serve what comes nevertheless."""
        if not self.client.alive or self.error is not None:
            return "engine dead"
        if self.draining:
            return "draining"
        if self._tokenizer is None:
            return "loading"
        return "stalled" if self.client.stalled else "ok"

    @property
    def ready(self) -> bool:
        """Loaded, warmed up, not told to stop, and the engine lives and gets on."""
        return self.state == "ok"

    def check_serving(self) -> None:
        """Raises UnavailableError while the model loads, at the end of a drain, and without an engine."""
        if not self.client.alive:
            raise UnavailableError(
                "the engine has died",
                code="engine_dead",
                hint="the server is shutting down; another one may serve this",
            )
        if self.refusing:
            raise UnavailableError("the server is stopping", code="stopping", hint="send the request again")
        if self._tokenizer is None:
            raise UnavailableError("the model is still loading", hint="wait until /readyz answers 200")

    @property
    def tokenizer(self) -> ModelTokenizer:
        """The tokenizer; raises UnavailableError as check_serving does."""
        self.check_serving()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def forms(self) -> GrammarSpecs:
        """The compiler of grammars for structured output; made when it is first needed."""
        if self._forms is None:
            self._forms = GrammarSpecs(self.info, form_limits(self.settings))
        return self._forms

    @property
    def info(self) -> EngineInfo:
        """The model that is served, under its first name; raises UnavailableError before it is."""
        found = self.client.info
        if self._info is None or self._info[0] is not found:  # the hash over the weights may come later
            self._info = found, replace(found, model=self._names_of(found)[0])
        return self._info[1]

    @property
    def names(self) -> list[str]:
        """The names of what is served, the first in answers; raises UnavailableError before it is."""
        return self._names_of(self.client.info)

    def _names_of(self, info: EngineInfo) -> list[str]:
        return self.settings.served_model_name or [info.model]

    @property
    def gate(self) -> GateSettings:
        """The gate settings of requests that arrive now; raises UnavailableError before something is served."""
        return self._gate or stored_settings(self.info.xlora_config)

    @gate.setter
    def gate(self, settings: GateSettings) -> None:
        self._gate = settings

    @property
    def scalings_log(self) -> ScalingsLog:
        """Raises UnavailableError before something is served."""
        if self._scalings_log is None:
            self._scalings_log = ScalingsLog(self.info)
        return self._scalings_log

    def _on_step(self, stats: StepStats) -> None:
        self.metrics.observe_step(stats)
        if stats.logged:
            self.scalings_log.add(stats.logged)

    async def start(self) -> None:
        """Loads the model and runs one short generation. Raises StartupError."""
        self.metrics.resources.start()  # what a load takes is worth seeing
        await self.client.start(engine_options(self.settings), lambda text: logger.info("%s", text))
        self._chats = ChatRenderer(Path(self.info.tokenizer_path).parent, self.settings.max_body_bytes)
        self._chats.start()
        self.sampling_defaults = SamplingDefaults.of(self.settings, self.info)
        tokenizer = ModelTokenizer(self.info, self._chats, self.sampling_defaults)
        self.metrics.describe_engine(self.info)
        await self._warm_up()
        self.client.on_step = self._on_step
        self._tokenizer = tokenizer
        self.loaded_at = int(time.time())
        seconds = time.monotonic() - self.started_at
        logger.info("%s is ready on %s, %s, after %.1f s", self.info.model, self.info.device, self.info.dtype, seconds)

    async def close(self) -> None:
        """Ends the engine, and the processes that compile grammars and render chats."""
        self.metrics.resources.stop()
        await self.client.close()
        for one in (self._forms, self._chats):
            if one is not None:
                one.close()

    async def _own_metrics(self) -> bytes:
        return self.metrics.render()

    async def _warm_up(self) -> None:
        room = self.info.max_model_len
        prompt = [0] * min(_WARM_UP_PROMPT, room - 1)
        sampling = SamplingParams(max_tokens=min(_WARM_UP_TOKENS, room - len(prompt)), ignore_eos=True)
        try:
            async with self.client.submit(Request(new_id("warmup"), prompt, sampling)) as outputs:
                async for output in outputs:
                    if output.finish_reason == "error":
                        raise StartupError(f"the warm-up generation failed: {output.error}")
        except RequestError as error:
            raise StartupError(f"the warm-up generation failed: {error.message}") from None


def form_limits(settings: Settings) -> FormLimits:
    """Return the bounds of JSON where its schema has none."""
    return FormLimits(settings.json_max_characters, settings.json_max_items, settings.json_max_digits)


def engine_options(settings: Settings) -> EngineOptions:
    """The part of the settings that the engine's process needs."""
    return EngineOptions(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_memory_bytes=settings.kv_memory,
        block_size=settings.block_size,
        threads=settings.threads,
        tensor_parallel=settings.tensor_parallel,
        lookahead=settings.lookahead,
        native_kernels=settings.native_kernels,
        cuda_graphs=settings.cuda_graphs,
        native_cache=settings.native_cache,
        draft_depth=settings.draft_depth,
        speculative_tokens=settings.speculative_tokens,
        prefix_cache=settings.prefix_cache,
        allow_outside=settings.allow_outside,
        quantization=settings.quantization,
        base=settings.base,
        experts=tuple(settings.expert),
        ordering=settings.ordering,
        gate_relu=settings.gate_relu,
        eos_from_tokenizer=settings.eos_from_tokenizer,
    )


def new_id(prefix: str) -> str:
    """A request id."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def service_of(request: HttpRequest) -> Service:
    """The dependency of every route; `async`, as FastAPI would call it in another thread."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def run_startup(service: Service, on_failure: asyncio.Event) -> None:
    """Starts the service in the background; a failure, now or later, is kept for whoever runs the server."""

    def on_lost(reason: str) -> None:
        service.error = EngineLostError(f"the engine is lost: {reason}", hint="start the service again")
        on_failure.set()

    try:
        await service.start()
        service.client.on_lost = on_lost
    except StartupError as error:
        service.error = error
        on_failure.set()
    except Exception as error:
        logger.exception("starting failed")
        service.error = StartupError(f"starting failed: {type(error).__name__}: {error}")
        on_failure.set()
