"""The surface of a call, as work for the engine sees it: of HTTP's calls (call.py), and of those in process.

This file knows no HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from service.api.generation.admission import Permit
from service.api.generation.choice import Delta, Generation
from service.api.generation.tokenizer import ModelTokenizer
from service.api.structured_output.grammar_spec import GrammarSpecs
from service.client.engine_client import Client
from service.contract.engine_info import EngineInfo
from service.contract.request import Request, SamplingParams


class Host(Protocol):
    """The process that a call is in: its engine and all that turns texts into token ids."""

    @property
    def client(self) -> Client:
        """The engine."""

    @property
    def info(self) -> EngineInfo:
        """The model, under the name that answers have."""

    @property
    def names(self) -> list[str]:
        """The names of the model, the first in answers."""

    @property
    def tokenizer(self) -> ModelTokenizer:
        """The tokenizer."""

    @property
    def forms(self) -> GrammarSpecs:
        """The compiler of grammars for structured output."""


class Caller(Protocol):
    """One call, from the body that has been read to the end of its answer."""

    @property
    def id(self) -> str:
        """The id of the answer; those of the engine's requests begin with it."""

    @property
    def service(self) -> Host:
        """The process that the call is in."""

    @property
    def deadline(self) -> float | None:
        """The end of the call, in the time of the event loop; None: it may take as long as it takes."""

    def begin(self, sampling: SamplingParams | None, prompt_tokens: int | None = None) -> None:
        """The call has been checked. `prompt_tokens` are of what does not generate."""

    def admit(self, requests: Sequence[Request], *, continued: bool = False) -> AbstractContextManager[Permit]:
        """A place in the queue, as Admission.admit gives it."""

    def deltas(self, generation: Generation) -> AsyncGenerator[list[Delta], None]:
        """The deltas of a generation, in lists of what came together."""
