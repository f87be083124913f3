"""A limit of the bytes per second that each client may send, checked before they are decoded."""

from __future__ import annotations

import time

BYTES_PER_S = 4 << 20
BURST_S = 2.0
_LEAST_BYTES = 256  # a message costs at least this much
_MAX_CLIENTS = 1024


class RateLimit:
    """Allows each client `BYTES_PER_S`, after a pause up to `BURST_S` seconds' worth at once."""

    def __init__(self) -> None:
        self._busy_until_s: dict[bytes, float] = {}  # when the rate has caught up with a client

    def allows(self, client: bytes, nbytes: int) -> bool:
        """Return True, and count the message, if the client may send it now."""
        now_s = time.monotonic()
        if len(self._busy_until_s) > _MAX_CLIENTS:
            busy = self._busy_until_s.items()
            self._busy_until_s = {each: until_s for each, until_s in busy if until_s > now_s}
        until_s = max(now_s, self._busy_until_s.get(client, now_s))
        until_s += max(nbytes, _LEAST_BYTES) / BYTES_PER_S
        if until_s - now_s > BURST_S:
            return False
        self._busy_until_s[client] = until_s
        return True
