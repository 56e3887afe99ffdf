"""A connection's output that its peer has not taken, and for how long it has taken nothing."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios

_INT = struct.Struct("i")


class Outflow:
    """The output of one connection."""

    def __init__(self, transport: asyncio.Transport, now: float) -> None:
        self._transport = transport
        self._untaken = 0
        self._taken_at = now

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the kernel has no room for."""
        return self._transport.get_write_buffer_size()

    def stuck_seconds(self, now: float, growing: bool, closing: bool) -> float:
        """How long the peer has taken nothing, as far as this was asked.

        While the output may be growing nobody can tell. A connection that is closing waits for its peer in any case.
        """
        untaken = 0 if growing else self.unsent_bytes + self._unacknowledged_bytes()
        if growing or untaken < self._untaken or not (untaken or closing):
            self._taken_at = now
        self._untaken = untaken
        return now - self._taken_at

    def _unacknowledged_bytes(self) -> int:
        """Bytes in the kernel's buffer, which are megabytes on a fast network: a slow reader may take long for the part
        after which the transport notices.
        """
        try:
            answer = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(_INT.size))
        except (OSError, ValueError):  # closed, where TLS has not said so yet
            return 0
        (count,) = _INT.unpack(answer)
        return int(count)
