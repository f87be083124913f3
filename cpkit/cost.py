"""Predict the time of a gather from its passes, bytes and synchronizations. Pure.

S = bytes of the gathered tensor, W = cp_size, P = S with padding. Bytes moved are bytes read plus
bytes written, summed over all ranks:

    algorithm          pad      wire                           strip    reorder
    padded             2·P      (4·(W-1) + 2)·P over TCP       2·W·S    2·W·S
    padded_symm_recv   2·P      (W+1)·P                        2·W·S    2·W·S
    padded_symm        2·P      (W+1)·P                        2·W·S    2·W·S
    direct             -        (W+1)·S                        -        -

A push reads each row once and writes it W times. No gather into W separate outputs can move less
than (W+1)·S. A loopback TCP socket copies each received byte into the kernel and out of it.

The model describes ranks that share cores, a cache and a memory. With R ranks per core, a core runs
its ranks one after another, so the bytes of one rank count R times:

    time = start · steps + R · (cached / cache rate + far / memory rate
                                + fresh / first-touch rate + socket / socket rate)

`steps` counts waits: each rank of a core waits for each other one, which takes R² steps. A ring
over sockets has W-1 consecutive steps, each of which takes R. `cached` and `far` are the copied
bytes that hit the last-level cache or go to memory; the working set of all ranks decides which.
`fresh` are bytes of ordinary memory that the C library maps again in every call, with a page fault
per page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cpkit.algorithms import TABLE

PASSES = {**{name: row.passes for name, row in TABLE.items()}, "plan": ("wire",)}
MMAP_BYTES = 32 << 20  # glibc's malloc maps each block of at least this size, and free unmaps it


@dataclass(frozen=True)
class Traffic:
    """Bytes read plus bytes written, summed over all ranks."""

    wire_bytes: int
    copied_bytes: int

    @property
    def moved_bytes(self) -> int:
        """The sum of both."""
        return self.wire_bytes + self.copied_bytes


def traffic(
    algorithm: str, total_bytes: int, cp_size: int, padded_bytes: int | None = None
) -> Traffic:
    """Return the bytes that a gather of `total_bytes` moves (`padded_bytes` with its padding).

    Raises ValueError for an unknown algorithm.

        >>> traffic("direct", 1000, 4).moved_bytes
        5000
    """
    if algorithm not in PASSES:
        raise ValueError(f"algorithm is {algorithm!r}; it must be one of {', '.join(PASSES)}")
    padded = total_bytes if padded_bytes is None else padded_bytes
    if algorithm in ("direct", "plan"):
        return Traffic((cp_size + 1) * total_bytes, 0)
    copies = 2 * padded + 2 * (2 * cp_size * total_bytes)
    wire = (cp_size + 1) * padded
    if algorithm == "padded":
        wire = (4 * (cp_size - 1) + 2) * padded
    return Traffic(wire, copies)


@dataclass(frozen=True)
class Host:
    """A machine whose ranks share cores, one cache and one memory."""

    cores: int
    cache_bytes: int

    def ranks_per_core(self, cp_size: int) -> float:
        """Return the number of ranks that share a core, 1 or more."""
        return max(1.0, cp_size / self.cores)

    def steps(self, algorithm: str, cp_size: int) -> float:
        """Return the number of waits; with one rank per core a barrier counts as 1."""
        ranks = self.ranks_per_core(cp_size)
        return ranks * (cp_size - 1) if algorithm == "padded" else ranks**2

    def far_fraction(self, working_set_bytes: float) -> float:
        """Return the fraction of the bytes that miss the cache: 0 for working sets up to a quarter
        of the cache, 1 from twice its size on, in between linear in the logarithm.
        """
        low, high = self.cache_bytes / 4, self.cache_bytes * 2
        if working_set_bytes <= low:
            return 0.0
        return min(1.0, math.log(working_set_bytes / low) / math.log(high / low))


def working_set_bytes(algorithm: str, total_bytes: int, cp_size: int) -> int:
    """Return the memory that a call touches on all ranks: the shards and each rank's buffers."""
    buffers = {"direct": 1, "plan": 2, "padded": 3}.get(algorithm, 3)
    return total_bytes * (1 + buffers * cp_size)


FEATURES = ("start", "cached", "far", "fresh", "socket")


def features(algorithm: str, total_bytes: int, cp_size: int, host: Host) -> tuple[float, ...]:
    """Return the factors of the coefficients: steps, and the bytes that a core moves."""
    moved = traffic(algorithm, total_bytes, cp_size)
    ranks = host.ranks_per_core(cp_size)
    per_core = ranks / cp_size
    socket_bytes = moved.wire_bytes * per_core if algorithm == "padded" else 0.0
    copied = moved.moved_bytes * per_core - socket_bytes
    far = host.far_fraction(working_set_bytes(algorithm, total_bytes, cp_size))
    buffers = {"padded": 3, "padded_symm_recv": 2, "padded_symm": 2}.get(algorithm, 0)
    fresh = buffers * total_bytes * ranks if total_bytes >= MMAP_BYTES else 0.0
    steps = host.steps(algorithm, cp_size)
    return steps, copied * (1 - far), copied * far, fresh, socket_bytes


@dataclass(frozen=True)
class HostModel:
    """Coefficients per algorithm, in µs and µs per byte, in the order of `FEATURES`."""

    host: Host
    coefficients: Mapping[str, tuple[float, ...]]

    def predict_us(self, algorithm: str, total_bytes: int, cp_size: int) -> float:
        """Return the time of one gather. Raises KeyError for an algorithm that was not fitted."""
        weights = self.coefficients[algorithm]
        counted = features(algorithm, total_bytes, cp_size, self.host)
        return sum(w * x for w, x in zip(weights, counted, strict=True))
