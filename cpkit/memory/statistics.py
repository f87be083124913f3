"""The use of a pool over time, and the cost of growing it. Data for tables and plots."""

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
    """What a pool has done: its spills, its registrations, and samples of its use."""

    def __init__(self) -> None:
        self.samples: deque[PoolSample] = deque(maxlen=_MAX_SAMPLES)  # oldest first
        self._start_s = time.monotonic()
        self._spills, self._spill_ms = 0, 0.0
        self._registrations, self._registering_ms = 0, 0.0

    def add_spill(self, took_ms: float) -> None:
        """Count a segment that a block made at run time."""
        self._spills += 1
        self._spill_ms += took_ms

    def add_registration(self, took_ms: float) -> None:
        """Count a segment, made at any time."""
        self._registrations += 1
        self._registering_ms += took_ms

    def sample(self, allocator: BlockAllocator) -> None:
        """Add a sample of the pool as it is now."""
        used_bytes, largest = allocator.used_bytes, allocator.largest_free()
        free_bytes, time_s = allocator.total_bytes - used_bytes, time.monotonic() - self._start_s
        self.samples.append(
            PoolSample(time_s, used_bytes, allocator.peak_bytes, free_bytes, largest, self._spills)
        )

    def statistics(
        self, allocator: BlockAllocator, arena_bytes: int, segments: int
    ) -> PoolStatistics:
        """Return the statistics up to now."""
        return PoolStatistics(
            segments=segments,
            arena_bytes=arena_bytes,
            spill_bytes=allocator.total_bytes - arena_bytes,
            used_bytes=allocator.used_bytes,
            peak_bytes=allocator.peak_bytes,
            largest_free_bytes=allocator.largest_free(),
            live_blocks=len(allocator.blocks),
            spills=self._spills,
            spill_ms=self._spill_ms,
            registrations=self._registrations,
            registering_ms=self._registering_ms,
        )
