"""Ends a server under load and tells whether it drained: python3 docker/drain.py PORT COMMAND...

Starts four long streams on 127.0.0.1:PORT, runs COMMAND (which sends SIGTERM), and expects every stream to come to its
end and a new request to be refused with 503. Needs nothing but Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException

STREAMS, TOKENS = 4, 600


def post(port: int, body: dict[str, object]) -> urllib.request.addinfourl:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer: urllib.request.addinfourl = urllib.request.urlopen(request, timeout=180)
    return answer


def read(port: int, number: int, begun: threading.Semaphore, complete: list[int]) -> None:
    """One stream; its number goes to `complete` when the last event has come."""
    prompt = f"Compute {number + 20} + 87.\n"
    body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "seed": number}
    try:
        with post(port, body) as answer:
            first = answer.readline()
            begun.release()
            if (first + answer.read()).endswith(b"data: [DONE]\n\n"):
                complete.append(number)
    except (OSError, HTTPException) as error:
        begun.release()
        print(f"stream {number}: {error!r}", file=sys.stderr)


def refusal(port: int) -> int:
    """The status with which the draining server answers a new request."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            post(port, {"prompt": "a", "max_tokens": 1}).close()
        except urllib.error.HTTPError as error:
            return error.code
        time.sleep(0.02)
    return 200


def main() -> int:
    port, command = int(sys.argv[1]), sys.argv[2:]
    begun, complete = threading.Semaphore(0), list[int]()
    streams = [threading.Thread(target=read, args=(port, number, begun, complete)) for number in range(STREAMS)]
    for stream in streams:
        stream.start()
    for _ in streams:
        begun.acquire()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    status = refusal(port)
    for stream in streams:
        stream.join()
    print(f"streams after SIGTERM        {len(complete)} of {STREAMS} complete, a new request was answered {status}")
    return 0 if len(complete) == STREAMS and status == 503 else 1


if __name__ == "__main__":
    sys.exit(main())
