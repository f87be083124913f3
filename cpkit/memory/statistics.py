"""The use of a pool over time, and the cost of growing it. Data for tables and plots."""

from __future__ import annotations

import msgspec


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
