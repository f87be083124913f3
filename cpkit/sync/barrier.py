"""A barrier, and a board on which each rank pins a note that all others read at that barrier.

Each rank owns one page in shared memory that only it writes: a counter of barriers it has come to,
and two places that take turns, for a note and for the call that it is in.

    rank 0   pin call and note n ── counter = n ── wait for all counters ≥ n ── read all of turn n
    rank 1        pin call and note n ── counter = n ── wait …               ── read all of turn n

Two places are enough: rank 0 overwrites its note n at turn n+2, and it gets there only after
every rank has come to turn n+1, which is after reading the notes of turn n.

Ranks that come to one barrier out of different calls all hear of it: else a rank that left a gather
half-way, by an exception, would end its peers' gather with its next call, without its rows.

Memory ordering: what a rank wrote before its counter must be visible to whoever sees the counter.
x86 keeps that order by itself; arm64 does not, and plain Python stores have no release semantics.
`fence()` therefore releases and takes back a lock that is never contended. Both are atomic
operations, release first and acquire second, and a load-acquire is never moved before an earlier
store-release (Arm's RCsc rule; on x86 both are locked instructions). So everything before the fence
is ordered before everything after it, on both machines. The counters are aligned 8-byte words,
which both machines load and store whole.

A barrier is only as quick as the cores are free. torch's own threads spin after each parallel copy:
with two a rank (OMP_NUM_THREADS=2) on two cores, barriers right after a copy took 2 ms between 2
ranks, 4 ms between 4 and 27 ms between 8. torchrun starts ranks with one thread each; leave it so.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from cpkit.sync.exchange import StoreExchange, deadline_s
from cpkit.sync.shm import make_segment

PAGE_BYTES = 16384
NOTE_BYTES = 7168
_NOTES = (1024, 1024 + 7680)
_CALLS = (1, 2)  # words beside the counter
PLAIN, MEETING = 0, 1  # calls; a plan's are numbers from `ShmBarrier.new_call`
_SHORT_WAIT_S = 0.02
_SHORT_NAP_S = 1e-6  # as short as the system can; Linux makes it about 55 µs
_YIELDS = (4, 64)  # least and most before a nap, where ranks share a core
_NAP_S = 0.0002


class _OwnLock(threading.local):
    """A lock for each thread, held by it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()


_own = _OwnLock()
give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class BarrierTimeout(TimeoutError):
    """A rank did not come to a barrier in time."""


def cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def fence() -> None:
    """Order all memory accesses before it before all accesses after it."""
    _own.lock.release()
    _own.lock.acquire()


class CallsDiffer(RuntimeError):
    """The ranks came to a barrier out of different calls. Raised on every rank."""


class ShmBarrier:
    """Barriers and notes between the ranks of one machine. Every rank calls the same, in order."""

    def __init__(self, rendezvous: StoreExchange, purpose: str) -> None:
        self.rank, self.size, self._name = rendezvous.rank, rendezvous.size, rendezvous.name
        segment = make_segment(rendezvous, PAGE_BYTES, purpose)
        self._pages = [memoryview(page) for page in segment.maps]
        self._words = [page.cast("Q") for page in self._pages]  # word 0 is the counter
        self._turn = 0
        self._broken = ""
        self._crowded = self.size > cores()
        self._polls, self._yields = (0, _YIELDS[0]) if self._crowded else (500, 256)

    def new_call(self, number: int) -> int:
        """A name for calls to come, the same on every rank and no other's; for each number below
        65536 one. Ranks that are in step have come to equally many barriers.
        """
        return self._turn << 16 | number

    def barrier(self, call: int = PLAIN) -> None:
        """Wait for all ranks. Raises BarrierTimeout naming those that did not come, and CallsDiffer
        on every rank when one came out of another call.
        """
        if self._broken:
            raise BarrierTimeout(f"{self._broken} The group is out of step since then.")
        self._turn += 1
        turn = self._turn
        place = _CALLS[turn % 2]
        self._words[self.rank][place] = call
        fence()
        self._words[self.rank][0] = turn
        for counter in self._words:
            if counter[0] < turn:
                self._wait(counter, turn)
        fence()
        for words in self._words:
            if words[place] != call:
                raise self._calls_differ([words[place] for words in self._words])

    def exchange(self, note: bytes) -> list[bytes]:
        """A barrier at which everybody reads everybody's note (at most NOTE_BYTES bytes)."""
        if len(note) > NOTE_BYTES:
            raise ValueError(f"a note has {len(note)} bytes; at most {NOTE_BYTES} fit on the board")
        place = _NOTES[(self._turn + 1) % 2]
        self._words[self.rank][place // 8] = len(note)
        self._pages[self.rank][place + 8 : place + 8 + len(note)] = note
        self.barrier(MEETING)
        lengths = [words[place // 8] for words in self._words]
        pairs = zip(self._pages, lengths, strict=True)
        return [bytes(page[place + 8 : place + 8 + length]) for page, length in pairs]

    def _wait(self, counter: memoryview, turn: int) -> None:
        """Poll, then yield, then nap; how long depends on who else needs this core.

        With a core for every rank: poll for as long as a short wait takes, then yield.

        With several ranks a core: yield at once, as the rank waited for may need this very core,
        and nap when that does not bring it. Among ranks alone a barrier is a few yields, and a nap
        would double it. Beside any other work a yield is dear: Linux charges the rank that yields
        for the rest of its time slice, so the other work runs for milliseconds before it. So
        patience is learned as TCP learns a window: a nap cuts it to 4 yields, a wait without one
        adds 4, up to 64. Barriers of 8 ranks on 2 busy cores: 0.2 to 0.4 ms with 64 yields always,
        0.08 ms so.

        After 20 ms the wait is not a short one any more, and longer naps leave the core alone.
        """
        for _ in range(self._polls):
            if counter[0] >= turn:
                return
        start = time.monotonic()
        waited_s = 0.0
        while waited_s < _SHORT_WAIT_S:
            for _ in range(self._yields):
                if counter[0] >= turn:
                    if self._crowded:
                        self._yields = min(self._yields + _YIELDS[0], _YIELDS[1])
                    return
                give_way()
            if self._crowded:
                self._yields = _YIELDS[0]
                time.sleep(_SHORT_NAP_S)
            waited_s = time.monotonic() - start
        while counter[0] < turn:
            if time.monotonic() - start > deadline_s():
                raise self._timeout(turn)
            time.sleep(_NAP_S)

    def _timeout(self, turn: int) -> BarrierTimeout:
        late = [str(rank) for rank, counter in enumerate(self._words) if counter[0] < turn]
        self._broken = (
            f"{self._name}: rank {self.rank} waited {deadline_s():g} s for rank(s) "
            f"{', '.join(late)} at barrier {turn}."
        )
        return BarrierTimeout(
            f"{self._broken} They died, hang, or took another way through the program."
        )

    def _calls_differ(self, calls: list[int]) -> CallsDiffer:
        said = ", ".join(f"rank {rank} at {_in_words(call)}" for rank, call in enumerate(calls))
        return CallsDiffer(
            f"{self._name}: the ranks came to barrier {self._turn} out of different calls: {said}. "
            f"What this call gathered is not whole. Every rank has to make the same calls in the "
            f"same order; after an exception in the midst of one, start clean with "
            f"cpkit.group.forget_groups() on every rank"
        )


def _in_words(call: int) -> str:
    if call >> 16:
        return f"the end of a plan's call (plan {call >> 16}, output {call & 0xFFFF})"
    return "the meeting before a collective" if call == MEETING else "the end of a gather or alone"
