"""The socket that the server listens on."""

from __future__ import annotations

import errno
import socket

from service.contract.errors import StartupError

_BACKLOG = 2048
_REASONS = {
    errno.EADDRINUSE: ("the port is in use", "stop the other server, or choose another --port; 0 takes a free one"),
    errno.EACCES: ("ports below 1024 are for root", "choose another --port"),
    errno.EADDRNOTAVAIL: ("this machine has no such address", "127.0.0.1 is for this machine alone, 0.0.0.0 for all"),
}


def bind(host: str, port: int) -> socket.socket:
    """Returns the listening socket. Raises StartupError when the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        otherwise = ((error.strerror or str(error)).lower().partition(" (while ")[0], "choose another --host or --port")
        reason, hint = _REASONS.get(error.errno or 0, otherwise)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from None
