"""What torch.cuda is asked for, on a device that computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.fake_cuda_device import Device

PROCESSORS = 132
_FREE_BYTES = 1 << 30


def runtime(cuda: Device) -> list[tuple[Any, str, Any]]:
    """What torch.cuda is asked for."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.moment = 0

        def record(self, _stream: Any = None) -> None:
            self.moment = cuda.queued

        def synchronize(self) -> None:
            cuda.wait("event", self.moment)

        def query(self) -> bool:
            return self.moment <= cuda.done

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.cuda_stream = 0

        def synchronize(self) -> None:
            cuda.wait("stream")

        def record_event(self, event: Event | None = None) -> Event:
            event = Event() if event is None else event
            event.record()
            return event

        def wait_event(self, _event: Event) -> None: ...

        def wait_stream(self, _stream: Stream) -> None: ...

    class Graph:
        def replay(self) -> None:
            cuda.launch("replay of a graph")

    @contextmanager
    def capture(_graph: Graph, **_: Any) -> Iterator[None]:
        cuda.capturing = True
        try:
            with cuda.decoder():
                yield
        finally:
            cuda.capturing = False

    only = Stream()
    properties = SimpleNamespace(multi_processor_count=PROCESSORS, name="fake", total_memory=_FREE_BYTES)
    return [
        (torch.cuda, name, stand_in)
        for name, stand_in in {
            "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": tuple,
            "current_stream": lambda *_: only, "default_stream": lambda *_: only, "stream": lambda _: nullcontext(),
            "device": lambda _: nullcontext(), "device_of": lambda _: nullcontext(), "empty_cache": lambda: None,
            "synchronize": lambda *_: cuda.wait("synchronize"), "get_device_name": lambda *_: "fake",
            "get_device_properties": lambda *_: properties, "mem_get_info": lambda *_: (_FREE_BYTES, _FREE_BYTES),
        }.items()
    ]  # fmt: skip
