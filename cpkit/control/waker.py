"""A bell: any thread rings, and the thread that polls sockets wakes up."""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """Register it with a poller; it is readable once somebody has rung, until `silence`."""

    def __init__(self) -> None:
        self._button, self._sound = socket.socketpair()
        self._button.setblocking(False)
        self._sound.setblocking(False)

    def fileno(self) -> int:
        """What a poller looks at."""
        return self._sound.fileno()

    def ring(self) -> None:
        """Wake the thread; never waits."""
        with contextlib.suppress(OSError):  # it rings already, or nobody listens any more
            self._button.send(b"\0")

    def silence(self) -> None:
        """Take back all that was rung until now."""
        with contextlib.suppress(BlockingIOError):
            self._sound.recv(4096)

    def close(self) -> None:
        """Free both ends."""
        self._button.close()
        self._sound.close()
