"""litellm's proxy before the server, and the `openai` package before the proxy."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features import address, run
from openai_python import features

_READY_SECONDS = 120


@contextmanager
def proxy(key: str) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    parameters = {"model": "openai/demo", "api_base": address(), "api_key": "unused"}
    config = {"model_list": [{"model_name": "demo", "litellm_params": parameters}]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(json.dumps(config))
        command = [Path(sys.executable).with_name("litellm"), "--config", "config.yaml", "--port", str(port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "HOST": "127.0.0.1", "LITELLM_MASTER_KEY": key}, **quiet
        )
        try:
            wait(running, f"http://127.0.0.1:{port}/health/liveliness")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            running.terminate()
            running.wait(30)


def wait(running: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and running.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the proxy does not answer")


if __name__ == "__main__":
    own_key = f"sk-{secrets.token_hex(32)}"
    with proxy(own_key) as address_of_proxy:
        run(features(address_of_proxy, own_key))
