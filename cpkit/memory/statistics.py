"""What a pool has had: how full it was when, what growing cost. Data for tables and plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class PoolStatistics:
    """One rank's pool; bytes are bytes of this rank's own segments."""

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


class PoolSample(NamedTuple):
    """The pool at one moment. What is free but not in `largest_free_bytes` is fragmented."""

    time_s: float
    used_bytes: int
    peak_bytes: int
    free_bytes: int
    largest_free_bytes: int
    spills: int
