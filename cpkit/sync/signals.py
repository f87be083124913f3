"""Signals between two ranks on the CPU: "my data has arrived", without a barrier.

A sender and a receiver have two counters: signals sent, which only the sender writes, and signals
consumed, which only the receiver writes. With one writer each, no atomic operation is needed.

    rank 0   store row ─ sent[1] = 1
    rank 1               wait until sent[1] = 1 ─ consumed[0] = 1 ─ read row

A consumed signal does not mean that the row was read: before rank 0 stores the next row, rank 1
has to signal that it has read this one.

Memory ordering: as in cpkit.sync.barrier, a fence before a counter is stored and after it is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cpkit.settings import deadline_s
from cpkit.sync.barrier import BarrierTimeout, fence, yield_core
from cpkit.sync.exchange import StoreExchange
from cpkit.sync.shm import make_segment

_SHORT_WAIT_S = 0.02
_SLEEP_S = 0.0002


class ShmSignals:
    """The counters of all pairs of ranks, in both directions. Making them is collective."""

    def __init__(self, exchange: StoreExchange) -> None:
        self._rank, self._size, self._name = exchange.rank, exchange.size, exchange.name
        segment = make_segment(exchange, 2 * 8 * self._size, "make the signal words")
        words = [memoryview(page).cast("Q") for page in segment.maps]
        self._sent = [page[: self._size] for page in words]
        self._consumed = [page[self._size : 2 * self._size] for page in words]

    def put(self, peer: int) -> None:
        """Signal a peer. Blocks until the peer has consumed the previous signal."""
        mine = self._sent[self._rank]
        self._poll(lambda: self._consumed[peer][self._rank] == mine[peer], peer, "consume a signal")
        fence()
        mine[peer] += 1

    def wait(self, peer: int) -> None:
        """Wait for a peer's signal, and consume it."""
        mine = self._consumed[self._rank]
        self._poll(lambda: self._sent[peer][self._rank] > mine[peer], peer, "send a signal")
        fence()
        mine[peer] += 1

    def _poll(self, done: Callable[[], bool], peer: int, what: str) -> None:
        """Yield, then sleep. Raises BarrierTimeout naming the peer."""
        start = time.monotonic()
        while not done():
            waited_s = time.monotonic() - start
            if waited_s > deadline_s():
                raise BarrierTimeout(
                    f"{self._name}: rank {self._rank} waited {deadline_s():g} s for rank {peer} to "
                    f"{what}; it has died, is hanging, or has taken another path through the "
                    "program"
                )
            if waited_s < _SHORT_WAIT_S:
                yield_core()
            else:
                time.sleep(_SLEEP_S)
