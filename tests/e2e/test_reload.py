"""SIGHUP: keys and certificates are replaced under a stream that goes on."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.fake_engine import write_bundle
from tests.support.server_process import ROOT, free_port
from tests.support.waiting import PATIENCE_SECONDS, wait_for

OLD, NEW = "the-key-of-yesterday", "the-key-of-today"
LONG = {"prompt": "a", "max_tokens": 90, "ignore_eos": True, "stream": True}


class Service:
    """A server over TLS whose files a test may change, and what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.files = {name: folder / name for name in ("keys", "certificate", "private")}
        self.log = folder / "log"

    def write(self, key: str, name: str) -> None:
        """A file with this key, and a certificate of this name."""
        self.files["keys"].write_text(f"{key}\n")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-days", "2"]
        paths = ["-out", str(self.files["certificate"]), "-keyout", str(self.files["private"])]
        subprocess.run([*command, *paths], check=True, capture_output=True)

    def client(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", headers=headers, verify=False, timeout=60)

    def status(self, key: str) -> int:
        with self.client(key) as http:
            return http.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code

    def shown(self) -> bytes:
        """The certificate that a new connection sees."""
        return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", self.port)))

    def written(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.files["certificate"].read_text())

    def is_ready(self) -> bool:
        try:
            with self.client(OLD) as http:
                return http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Service, subprocess.Popen[bytes]]]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = Service(tmp_path)
    made.write(OLD, "old")
    flags = ["--model", write_bundle(tmp_path), "--port", made.port, "--api-key-file", made.files["keys"]]
    flags += ["--ssl-certfile", made.files["certificate"], "--ssl-keyfile", made.files["private"]]
    command = [sys.executable, "-m", "tests.support.fake_server", "serve", *map(str, flags)]
    with made.log.open("wb") as log, subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True) as process:
        try:
            assert wait_for(made.is_ready)
            yield made, process
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def test_keys_and_certificates_are_replaced_without_a_restart(
    service: tuple[Service, subprocess.Popen[bytes]],
) -> None:
    """The signal goes to the whole group, as a supervisor may send it: neither the engine nor a stream dies of it.

    What cannot be read changes nothing.
    """
    made, process = service
    with made.client(OLD) as http, http.stream("POST", "/generate", json=LONG) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        made.write(NEW, "new")
        os.killpg(process.pid, signal.SIGHUP)
        assert wait_for(lambda: b"reloaded keys" in made.log.read_bytes())
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert (made.status(OLD), made.status(NEW)) == (401, 200)
    assert made.shown() == made.written()

    in_use = made.written()
    made.write(OLD, "third")
    made.files["private"].write_text("no key")
    process.send_signal(signal.SIGHUP)
    assert wait_for(lambda: b"keys and certificates stay as they were: --ssl-certfile" in made.log.read_bytes())
    assert (made.status(OLD), made.status(NEW)) == (401, 200)
    assert made.shown() == in_use
