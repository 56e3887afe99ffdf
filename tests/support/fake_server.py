"""The server with the fake engine in its engine's process: `python -m tests.support.fake_server serve ...`.

For what the processes do around an engine; it is ready several times sooner than one with a model.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from service.cli import main
from service.client.engine_client import EngineClient
from service.commands import serve

if __name__ == "__main__":
    client: Any = functools.partial(EngineClient, "tests.support.fake_engine:load_engine")
    serve.EngineClient = client  # type: ignore[misc]
    sys.exit(main())
