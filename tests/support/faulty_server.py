"""The server with an engine that fails when it is told to: `python -m tests.support.faulty_server serve ...`.

Everything is the product's own but for what raises in the engine's process:

    SIGUSR1 to it                      its next forward is out of memory
    SIGUSR2 to it                      its next forward raises what no request can be blamed for
    a request's cache_salt "sampling"  sampling its fourth token raises
    a request's cache_salt "taking"    taking in its fourth token raises, after the forward
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from service.cli import main
from service.client.engine_client import EngineClient
from service.commands import serve
from service.contract.options import EngineOptions

_AFTER_TOKENS = 3


def load_engine(options: EngineOptions, on_progress: Callable[[str], None], on_lost: Callable[[str], None]) -> Any:
    """In the engine's process."""
    from service.engine import loader, model_runner, sequence

    engine = loader.load_engine(options, on_progress, on_lost)
    fail_forwards(engine.runner.step)
    sample, accept = model_runner.sample, sequence.Sequence.accept

    def failing_sample(logits: Any, rows: Sequence[Any]) -> Any:
        for row in rows:
            fail_for(row.sequence, "sampling")
        return sample(logits, rows)

    def failing_accept(self: sequence.Sequence, token: int) -> bool:
        fail_for(self, "taking")
        return accept(self, token)

    model_runner.sample = failing_sample
    sequence.Sequence.accept = failing_accept  # type: ignore[method-assign]
    return engine


def fail_for(sequence: Any, salt: str) -> None:
    if sequence.request.cache_salt == salt and sequence.output_len >= _AFTER_TOKENS:
        raise ValueError(f"injected into {salt}")


def fail_forwards(step: Any) -> None:
    """A signal is good for one forward."""
    import torch

    forward = step.forward
    armed: list[Exception] = []

    def failing(*arguments: Any) -> Any:
        if armed:
            raise armed.pop()
        return forward(*arguments)

    step.forward = failing
    signal.signal(signal.SIGUSR1, lambda *_: armed.append(torch.OutOfMemoryError("injected")))
    signal.signal(signal.SIGUSR2, lambda *_: armed.append(RuntimeError("injected")))


if __name__ == "__main__":
    client: Any = functools.partial(EngineClient, "tests.support.faulty_server:load_engine")
    serve.EngineClient = client  # type: ignore[misc]
    sys.exit(main())
