"""A stand-in for a pager: writes every alert that Alertmanager sends to its log, one line each.

    python3 pager.py [HOST:PORT]

The path of the webhook (/page, /ticket) is the line's first word. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pager(BaseHTTPRequestHandler):
    """Takes Alertmanager's webhook (version 4); GET / is for health checks."""

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for line in lines(self.path, body):
                print(line, flush=True)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.send_error(400, f"not Alertmanager's webhook: {error!r}")
            return
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Alerts alone are in the log."""


def lines(path: str, body: bytes) -> list[str]:
    """`page firing XLoraEngineDown xlora:8000: summary`, for each alert of a group."""
    return [
        f"{path.strip('/')} {alert['status']} {alert['labels']['alertname']} "
        f"{alert['labels'].get('instance', '-')}: {alert['annotations'].get('summary', '')}"
        for alert in json.loads(body)["alerts"]
    ]


if __name__ == "__main__":
    host, _, port = (sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8080").partition(":")
    ThreadingHTTPServer((host, int(port)), Pager).serve_forever()
