"""Wake a thread that polls sockets from any other thread."""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """A socket pair to register with a poller: readable from `wake` until `clear`."""

    def __init__(self) -> None:
        self._writer, self._reader = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.setblocking(False)

    def fileno(self) -> int:
        """Return the file descriptor to poll."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make the pair readable, without blocking."""
        with contextlib.suppress(OSError):  # full, so already readable; or closed
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Consume all calls of `wake` so far."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def close(self) -> None:
        """Close both sockets."""
        self._writer.close()
        self._reader.close()
