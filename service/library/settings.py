"""Which of the server's settings an engine in process has.

This file knows names, and no values.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.contract.errors import SettingsError
from service.contract.spelling import likely
from service.settings import Settings

# Settings of the server that say nothing here.
_OF_HTTP = frozenset(
    {
        *("host", "port", "max_header_bytes", "max_queued_requests", "max_queued_tokens", "request_timeout"),
        *("write_timeout", "keep_alive", "drain_seconds", "drain_delay", "api_key_file", "api_keys"),
        *("admin_key_file", "admin_keys", "cors_origins", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"),
        *("log_format", "log_level", "otlp_endpoint", "model"),
    }
)
SETTINGS = frozenset(Settings.model_fields) - _OF_HTTP


def check_settings(settings: Mapping[str, object]) -> None:
    """Raises SettingsError for keywords that are no settings of a model in process."""
    for name in settings:
        if name not in SETTINGS:
            close = likely(name, SETTINGS)
            hint = f"did you mean `{close}`?" if close else f"known: {', '.join(sorted(SETTINGS))}"
            why = " in process: it is of the HTTP server" if name in _OF_HTTP else ""
            raise SettingsError(f"`{name}` is no setting of a model{why}", hint=hint)
