"""The typed messages between the API process and the engine process, in length-prefixed frames on a socket.

A frame is a 4-byte little-endian length and that many bytes of msgpack. Nothing is pickled, so neither side can make
the other run code. This file knows no asyncio and no engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from service.contract.engine_info import EngineInfo
from service.contract.options import EngineOptions
from service.contract.output import StepOutput
from service.contract.request import Request
from service.contract.steering import GateSettings

_HEADER_BYTES = 4


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message to the engine: load this."""

    options: EngineOptions


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Queue a request. Checked by the sender."""

    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Drop a request, or one of its choices."""

    request_id: str
    index: int | None = None


class SetGate(msgspec.Struct, tag=True, frozen=True):
    """The gate of requests submitted after this. Checked by the sender."""

    settings: GateSettings


class LogScalings(msgspec.Struct, tag=True, frozen=True):
    """Whether steps are to bring what the classifier says, from now on."""

    enabled: bool


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Are you there? Answered by Pong between two steps."""


class Pong(msgspec.Struct, tag=True, frozen=True):
    """Yes."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """Loading goes on; one line for a person."""

    text: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Loading is done."""

    info: EngineInfo


class Identified(msgspec.Struct, tag=True, frozen=True):
    """The hash over all weight files, where it was not known when the engine was ready."""

    weights_sha256: str


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine process is about to end: it could not load, or a step raised."""

    message: str
    hint: str | None = None


class Step(msgspec.Struct, tag=True, frozen=True):
    """The output of one step, for all requests together."""

    output: StepOutput


ToEngine = Start | Submit | Abort | SetGate | LogScalings | Ping
FromEngine = Pong | Progress | Ready | Identified | Failed | Step


class FrameEncoder:
    """Messages to frames; one encoder and one buffer for the life of the connection."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def encode(self, message: ToEngine | FromEngine) -> bytes:
        self._encoder.encode_into(message, self._buffer, _HEADER_BYTES)
        self._buffer[:_HEADER_BYTES] = (len(self._buffer) - _HEADER_BYTES).to_bytes(_HEADER_BYTES, "little")
        return bytes(self._buffer)


class FrameReader:
    """Collects bytes as they arrive and cuts them into the bodies of whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes more bytes and gives every frame they complete."""
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= _HEADER_BYTES:
                start = position + _HEADER_BYTES
                end = start + int.from_bytes(self._buffer[position:start], "little")
                if len(self._buffer) < end:
                    break
                position = end
                yield bytes(self._buffer[start:end])
        finally:
            del self._buffer[:position]
