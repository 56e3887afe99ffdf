"""What the proxy before the replicas adds to the first event of a stream.

    python -m benchmarks.proxy [--model DIR] [--requests 200]

The same request goes to a server directly and through the proxy of docker/haproxy in turns, each on a connection of its
own, one at a time; the server keeps no prefixes. Worst is compared with worst: a busy machine may miss that bar. Needs
haproxy (Debian: apt-get install haproxy).
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from pathlib import Path

from benchmarks.common import DEMO, Bar, emit, percentiles, print_row, prompt_tokens
from tests.support.proxy import MISSING, installed, proxy
from tests.support.server_process import server

_ADDED_SECONDS = 0.02
_PROMPT_TOKENS, _TOKENS, _WARM_UP = 32, 4, 10


def first_event_seconds(port: int, body: bytes) -> float:
    """From before the connection to the first line of the answer's body. Raises RuntimeError for an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    started = time.perf_counter()
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    seconds = time.perf_counter() - started
    answer.read()
    connection.close()
    if not line.startswith(b"data: "):
        raise RuntimeError(f"{answer.status}: {line!r}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--requests", type=int, default=200, help="of each side")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server")
    args = parser.parse_args()
    if not installed():
        raise SystemExit(MISSING)
    times: dict[str, list[float]] = {"direct": [], "proxy": []}
    flags = ("--model", str(args.model), "--threads", str(args.threads), "--no-prefix-cache")
    with (
        tempfile.TemporaryDirectory() as folder,
        server(*flags) as running,
        proxy([running.port], Path(folder)) as port,
    ):
        ports = {"direct": running.port, "proxy": port}
        for number in range(-_WARM_UP, args.requests):
            prompt = prompt_tokens(args.model, _PROMPT_TOKENS, seed=number + _WARM_UP)
            body = json.dumps({"prompt": prompt, "max_tokens": _TOKENS, "stream": True, "ignore_eos": True}).encode()
            for side in sorted(ports, reverse=number % 2 == 0):
                seconds = first_event_seconds(ports[side], body)
                if number >= 0:
                    times[side].append(seconds)
    rows = [{"side": side, **percentiles(taken), "worst": max(taken)} for side, taken in times.items()]
    for row in rows:
        print_row(row)
    found = {row["side"]: row for row in rows}
    added = {point: found["proxy"][point] - found["direct"][point] for point in ("p50", "p95", "worst")}
    emit(
        {"benchmark": "proxy", "requests": args.requests, "rows": rows, "added_seconds": added},
        [
            Bar(f"seconds to the first event that the proxy adds, {point}", "<=", _ADDED_SECONDS, added[point])
            for point in added
        ],
    )


if __name__ == "__main__":
    main()
