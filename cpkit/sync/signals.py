"""Signals between two ranks on the CPU: one word says "my data is there", without a barrier.

A pair of ranks has two counters, each written by one of them only: what the sender has sent, and
what the receiver has taken. So no store is ever lost, and no atomic operation is needed.

    rank 0   store row ─ sent[1] = 1
    rank 1               wait until sent[1] = 1 ─ taken[0] = 1 ─ read row

A word that was taken says nothing about the row: before rank 0 stores the next one, rank 1 has to
say by a signal of its own that it has read this one.

Memory ordering: as in cpkit.sync.barrier, a fence before a counter is stored and after it is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cpkit.sync.barrier import BarrierTimeout, fence, give_way
from cpkit.sync.exchange import StoreExchange, deadline_s
from cpkit.sync.shm import make_segment

_SHORT_WAIT_S = 0.02
_NAP_S = 0.0002


class ShmSignals:
    """A signal word from each rank to each other; making them is collective."""

    def __init__(self, rendezvous: StoreExchange) -> None:
        self._rank, self._size, self._name = rendezvous.rank, rendezvous.size, rendezvous.name
        segment = make_segment(rendezvous, 2 * 8 * self._size, "make the signal words")
        words = [memoryview(page).cast("Q") for page in segment.maps]
        self._sent = [page[: self._size] for page in words]
        self._taken = [page[self._size : 2 * self._size] for page in words]

    def put(self, peer: int) -> None:
        """Set my word at a peer, once the peer has taken the one before."""
        mine = self._sent[self._rank]
        self._wait(lambda: self._taken[peer][self._rank] == mine[peer], peer, "take a signal")
        fence()
        mine[peer] += 1

    def take(self, peer: int) -> None:
        """Wait for a peer's word, and empty it."""
        mine = self._taken[self._rank]
        self._wait(lambda: self._sent[peer][self._rank] > mine[peer], peer, "send a signal")
        fence()
        mine[peer] += 1

    def _wait(self, done: Callable[[], bool], peer: int, what: str) -> None:
        """Yield, then nap. Raises BarrierTimeout naming the peer."""
        start = time.monotonic()
        while not done():
            waited_s = time.monotonic() - start
            if waited_s > deadline_s():
                raise BarrierTimeout(
                    f"{self._name}: rank {self._rank} waited {deadline_s():g} s for rank {peer} to "
                    f"{what}; it died, hangs, or took another way through the program"
                )
            if waited_s < _SHORT_WAIT_S:
                give_way()
            else:
                time.sleep(_NAP_S)
