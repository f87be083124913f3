"""What a pool has had: how full it was when, what growing cost. Data for tables and plots."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from cpkit.memory.allocator import BlockAllocator

_MAX_SAMPLES = 4096


class PoolStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's pool. Bytes are bytes of this rank's own segments."""

    segments: int
    arena_bytes: int
    spill_bytes: int
    used_bytes: int
    peak_bytes: int
    largest_free_bytes: int
    live_blocks: int
    spills: int
    spill_ms: float
    registrations: int
    registering_ms: float


class PoolSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pool at one moment. Free bytes beyond `largest_free_bytes` are fragmented."""

    time_s: float
    used_bytes: int
    peak_bytes: int
    free_bytes: int
    largest_free_bytes: int
    spills: int


class PoolHistory:
    """The latest samples, one for each block that was placed or came back, oldest first."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self.samples: deque[PoolSample] = deque(maxlen=_MAX_SAMPLES)
        self._spills, self._spill_ms = 0, 0.0
        self._registrations, self._registering_ms = 0, 0.0

    def note(self, ledger: BlockAllocator) -> None:
        """The pool has changed."""
        self.samples.append(
            PoolSample(
                time.monotonic() - self._start_s,
                ledger.used_bytes,
                ledger.peak_bytes,
                ledger.total_bytes - ledger.used_bytes,
                ledger.largest_free(),
                self._spills,
            )
        )

    def registered(self, took_ms: float) -> None:
        """A segment was made and mapped."""
        self._registrations += 1
        self._registering_ms += took_ms

    def spilled(self, took_ms: float) -> None:
        """That segment was made at run time, because a block had no room."""
        self._spills += 1
        self._spill_ms += took_ms

    def statistics(
        self, ledger: BlockAllocator, sizes: list[int], arena_bytes: int
    ) -> PoolStatistics:
        """All of it in one row; `sizes` are the bytes of the segments."""
        return PoolStatistics(
            segments=len(sizes),
            arena_bytes=arena_bytes,
            spill_bytes=sum(sizes) - arena_bytes,
            used_bytes=ledger.used_bytes,
            peak_bytes=ledger.peak_bytes,
            largest_free_bytes=ledger.largest_free(),
            live_blocks=len(ledger.blocks),
            spills=self._spills,
            spill_ms=self._spill_ms,
            registrations=self._registrations,
            registering_ms=self._registering_ms,
        )
