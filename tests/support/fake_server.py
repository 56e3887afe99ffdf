"""The server with the fake engine in its engine's process: `python -m tests.support.fake_server serve ...`.

For what the processes do around an engine; it is ready several times sooner than one with a model. The variable
FAKE_LOADER names another function of fake_engine.py than load_engine.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from service.cli import main
from service.client.engine_client import EngineClient
from service.commands import serve

if __name__ == "__main__":
    loader = os.environ.get("FAKE_LOADER", "load_engine")
    client: Any = functools.partial(EngineClient, f"tests.support.fake_engine:{loader}")
    serve.EngineClient = client  # type: ignore[misc]
    sys.exit(main())
