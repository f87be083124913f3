"""A barrier in shared memory, at which the ranks also exchange small messages.

Each rank owns one page that only it writes: a counter of the barriers at which it has arrived, and
two slots, used alternately, for a message and for the call that the barrier belongs to.

    rank 0   write call and message n ── counter = n ── wait for all counters ≥ n ── read all of n
    rank 1        write call and message n ── counter = n ── wait …               ── read all of n

Two slots are enough. Rank 0 overwrites its message n in round n+2, which it reaches only after all
ranks have arrived at round n+1, that is after they have read the messages of round n.

When ranks arrive at one barrier from different calls, all of them raise. Otherwise a rank that left
a gather half-way, by an interrupt, would complete its peers' gather with its next call, and its
rows would be missing.

A rank that fails in a gather arrives at its peers' barrier as `FAILED`, with a message that says
why. The peers raise RankFailed with that message.

    rank 0   agreement │ store rows          │ barrier: RankFailed, "rank 1: out of memory"
    rank 1   agreement │ out of memory ─ fail│ raise its own error

Memory ordering: what a rank wrote before its counter must be visible to every rank that reads the
counter. x86 guarantees that order; arm64 does not, and plain Python stores have no release
semantics. `fence()` therefore releases and acquires a lock that is never contended. Both are atomic
operations, release first and acquire second, and a load-acquire never moves before an earlier
store-release (Arm's RCsc rule; on x86 both are locked instructions). So everything before the fence
is ordered before everything after it, on both architectures. The counters are aligned 8-byte words,
whose loads and stores are atomic on both.

A barrier is slow when threads outnumber cores, because torch's threads spin after each parallel
copy: with two per rank (OMP_NUM_THREADS=2) on two cores, a barrier right after a copy took 2 ms
for 2 ranks, 4 ms for 4 and 27 ms for 8. Keep torchrun's default of one thread per rank.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cpkit.settings import deadline_s
from cpkit.sync.exchange import StoreExchange
from cpkit.sync.shm import make_segment

PAGE_BYTES = 16384
MAX_MESSAGE_BYTES = 7168
_MESSAGES = (1024, 1024 + 7680)
_CALLS = (1, 2)  # words after the counter
PLAIN, EXCHANGE, REFUSED, FAILED = range(4)  # `ShmBarrier.new_call` numbers the calls of plans
_SHORT_WAIT_S = 0.02
_SHORT_SLEEP_S = 1e-6  # the shortest possible; takes about 55 µs on Linux
_YIELDS = (4, 64)  # minimum and maximum before a sleep, where ranks share a core
_SLEEP_S = 0.0002


class _OwnLock(threading.local):
    """One lock per thread, held by that thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()


_own = _OwnLock()
yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class BarrierTimeout(TimeoutError):
    """A rank did not arrive at a barrier in time."""


def cores() -> int:
    """Return the number of cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def fence() -> None:
    """Order all memory accesses before it before all accesses after it."""
    lock = _own.lock
    lock.release()
    lock.acquire()


class CallsDiffer(RuntimeError):
    """The ranks arrived at one barrier from different calls. Raised on every rank."""


class RankFailed(RuntimeError):
    """A rank failed in the call for which this one waited at a barrier. Raised on all its peers."""


class ShmBarrier:
    """Barriers and messages between the ranks of one machine; all make the same calls in order."""

    def __init__(self, exchange: StoreExchange, purpose: str) -> None:
        self.rank, self.size, self._name = exchange.rank, exchange.size, exchange.name
        segment = make_segment(exchange, PAGE_BYTES, purpose)
        self._pages = [memoryview(page) for page in segment.maps]
        self._words = [page.cast("Q") for page in self._pages]  # word 0 is the counter
        self._own = self._words[self.rank]
        self._round = 0
        self._broken = ""
        self._crowded = self.size > cores()
        self._polls, self._yields = (0, _YIELDS[0]) if self._crowded else (500, 256)

    def new_call(self, number: int) -> int:
        """Return a new identity for later calls, equal on all ranks; `number` is below 65536.

        It contains the count of barriers so far, which is unique and equal on all ranks.
        """
        return self._round << 16 | number

    def barrier(self, call: int = PLAIN) -> None:
        """Wait for all ranks.

        Raises BarrierTimeout naming the late ranks, CallsDiffer on every rank when the ranks
        arrived from different calls, and RankFailed when a peer failed in its call.
        """
        if self._broken:
            raise BarrierTimeout(f"{self._broken} The group has been out of step since then.")
        self._round = round = self._round + 1
        slot = _CALLS[round % 2]
        own = self._own
        own[slot] = call
        fence()
        own[0] = round
        for counter in self._words:
            if counter[0] < round:
                self._wait(counter, round)
        fence()
        for words in self._words:
            if words[slot] != call:
                raise self._difference([words[slot] for words in self._words])

    def exchange(self, message: bytes, call: int = EXCHANGE) -> list[bytes]:
        """Return the messages of all ranks, up to MAX_MESSAGE_BYTES each, by rank; a barrier."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message has {len(message)} bytes; at most {MAX_MESSAGE_BYTES} fit")
        slot = _MESSAGES[(self._round + 1) % 2]
        self._own[slot // 8] = len(message)
        self._pages[self.rank][slot + 8 : slot + 8 + len(message)] = message
        self.barrier(call)
        pairs = zip(self._pages, self._words, strict=True)
        return [bytes(page[slot + 8 : slot + 8 + words[slot // 8]]) for page, words in pairs]

    def fail(self, why: str) -> None:
        """Arrive at the barrier where the peers wait for this rank; they raise RankFailed."""
        with suppress(BarrierTimeout, CallsDiffer, RankFailed):
            self.exchange(why.encode()[:MAX_MESSAGE_BYTES], FAILED)

    @property
    def last_call(self) -> int:
        """The call of this rank's latest barrier: after EXCHANGE, peers wait at another one."""
        return self._own[_CALLS[self._round % 2]]

    def _wait(self, counter: memoryview, round: int) -> None:
        """Poll, then yield, then sleep; for how long depends on the load of this core.

        With a core per rank: poll for the duration of a short wait, then yield.

        With several ranks per core: yield at once, because the late rank may need this core, then
        sleep. If only ranks run, a barrier takes a few yields, and a sleep would double its time.
        If other processes run, a yield is expensive: Linux charges the rank that yields for the
        rest of its time slice, so the other process runs for milliseconds first. The number of
        yields therefore adapts like a TCP window: a sleep resets it to 4, a wait without a sleep
        adds 4, up to 64. Barriers of 8 ranks on 2 busy cores take 0.2 to 0.4 ms with a constant 64
        yields, and 0.08 ms with the adaptive number.

        After 20 ms, longer sleeps leave the core to other processes.
        """
        for _ in range(self._polls):
            if counter[0] >= round:
                return
        start = time.monotonic()
        waited_s = 0.0
        while waited_s < _SHORT_WAIT_S:
            for _ in range(self._yields):
                if counter[0] >= round:
                    if self._crowded:
                        self._yields = min(self._yields + _YIELDS[0], _YIELDS[1])
                    return
                yield_core()
            if self._crowded:
                self._yields = _YIELDS[0]
                time.sleep(_SHORT_SLEEP_S)
            waited_s = time.monotonic() - start
        while counter[0] < round:
            if time.monotonic() - start > deadline_s():
                raise self._timeout(round)
            time.sleep(_SLEEP_S)

    def _timeout(self, round: int) -> BarrierTimeout:
        late = [str(rank) for rank, counter in enumerate(self._words) if counter[0] < round]
        self._broken = (
            f"{self._name}: rank {self.rank} waited {deadline_s():g} s for rank(s) "
            f"{', '.join(late)} at barrier {round}."
        )
        return BarrierTimeout(
            f"{self._broken} They have died, are hanging, or have taken another path through the "
            "program: read their logs. To continue, call cpkit.group.forget_groups() on every "
            "rank, and make new groups. If the ranks are only slow, raise CPKIT_DEADLINE_S."
        )

    def _difference(self, calls: list[int]) -> CallsDiffer | RankFailed:
        if FAILED not in calls:
            return self._calls_differ(calls)
        slot, failed = _MESSAGES[self._round % 2], []
        for rank, (page, words) in enumerate(zip(self._pages, self._words, strict=True)):
            if calls[rank] == FAILED:
                message = bytes(page[slot + 8 : slot + 8 + words[slot // 8]])
                failed.append(f"rank {rank}: {message.decode(errors='ignore')}")
        return RankFailed(
            f"{self._name}: a rank failed in this call, so no rank has its result. "
            f"{'; '.join(failed)}. Start again with cpkit.group.forget_groups() on every rank"
        )

    def _calls_differ(self, calls: list[int]) -> CallsDiffer:
        listed = ", ".join(f"rank {rank} at {_describe(call)}" for rank, call in enumerate(calls))
        return CallsDiffer(
            f"{self._name}: the ranks arrived at barrier {self._round} from different calls: "
            f"{listed}. The result of this call is incomplete. Every rank has to make the same "
            "calls in the same order; after an interrupt inside one, start again with "
            "cpkit.group.forget_groups() on every rank"
        )


def _describe(call: int) -> str:
    if call >> 16:
        return f"the end of a plan's call (plan {call >> 16}, output {call & 0xFFFF})"
    return (
        "the end of a gather",
        "the agreement before a collective",
        "a plan's call that a check refused",
        "a call that failed",
    )[call]
