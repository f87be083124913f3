"""What a gather costs, counted from what it does: passes, bytes, synchronizations. Pure.

S = bytes of the gathered tensor, W = cp_size, P = S with padding. Bytes moved are bytes read plus
bytes written, by all ranks together:

    algorithm          pad      wire                           strip    reorder
    padded             2·P      (4·(W-1) + 2)·P over TCP       2·W·S    2·W·S
    padded_symm_recv   2·P      (W+1)·P                        2·W·S    2·W·S
    padded_symm        2·P      (W+1)·P                        2·W·S    2·W·S
    direct             -        (W+1)·S                        -        -

A push reads each row once, and writes it W times: (W+1)·S is the least that any gather into W
separate outputs can move. Through a loopback TCP socket each received byte is copied into the
kernel and out of it.

The model of ranks that share cores, a cache and a memory. A core works for its ranks one after
another, so what a rank moves counts `turns` = ranks per core times:

    time = start · steps + turns · (cached / cache rate + far / memory rate
                                    + fresh / first-touch rate + socket / socket rate)

`steps` are the waits for each other: every rank of a core waits for every other, turns² times; a
ring over sockets has W-1 steps one after the other, each as long as all ranks of a core take.
`cached` and `far` are the bytes of copies that hit the last-level cache or go to memory, decided by
the working set of all ranks; `fresh` is ordinary memory that the C library maps anew in every call,
page fault by page fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cpkit.algorithms import TABLE

PASSES = {**{name: row.passes for name, row in TABLE.items()}, "plan": ("wire",)}
MAPPED_ANEW_BYTES = 32 << 20  # glibc's malloc maps blocks from this size on, and unmaps them again


@dataclass(frozen=True)
class Traffic:
    """Bytes read plus written by all ranks together."""

    wire_bytes: int
    copied_bytes: int

    @property
    def moved_bytes(self) -> int:
        """All of it."""
        return self.wire_bytes + self.copied_bytes


def traffic(
    algorithm: str, total_bytes: int, cp_size: int, padded_bytes: int | None = None
) -> Traffic:
    """What an algorithm moves to gather `total_bytes`, which padding makes `padded_bytes`.

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

    def turns(self, cp_size: int) -> float:
        """Ranks that a core works for."""
        return max(1.0, cp_size / self.cores)

    def steps(self, algorithm: str, cp_size: int) -> float:
        """How often ranks wait for each other, in units of one rank with a core of its own."""
        turns = self.turns(cp_size)
        return turns * (cp_size - 1) if algorithm == "padded" else turns**2

    def far_share(self, working_set_bytes: float) -> float:
        """Share of the bytes that the cache does not serve: none up to a quarter of it, all from
        twice its size on, in proportion to the logarithm in between.
        """
        low, high = self.cache_bytes / 4, self.cache_bytes * 2
        if working_set_bytes <= low:
            return 0.0
        return min(1.0, math.log(working_set_bytes / low) / math.log(high / low))


def working_set_bytes(algorithm: str, total_bytes: int, cp_size: int) -> int:
    """Memory that a call touches, of all ranks: shards, and the buffers that each rank keeps."""
    buffers = {"direct": 1, "plan": 2, "padded": 3}.get(algorithm, 3)
    return total_bytes * (1 + buffers * cp_size)


FEATURES = ("start", "cached", "far", "fresh", "socket")


def features(algorithm: str, total_bytes: int, cp_size: int, host: Host) -> tuple[float, ...]:
    """What the coefficients are multiplied with: steps, and bytes that a core moves."""
    moved = traffic(algorithm, total_bytes, cp_size)
    turns = host.turns(cp_size)
    per_core = turns / cp_size
    socket_bytes = moved.wire_bytes * per_core if algorithm == "padded" else 0.0
    copied = moved.moved_bytes * per_core - socket_bytes
    far = host.far_share(working_set_bytes(algorithm, total_bytes, cp_size))
    anew = {"padded": 3, "padded_symm_recv": 2, "padded_symm": 2}.get(algorithm, 0)
    fresh = anew * total_bytes * turns if total_bytes >= MAPPED_ANEW_BYTES else 0.0
    steps = host.steps(algorithm, cp_size)
    return steps, copied * (1 - far), copied * far, fresh, socket_bytes


@dataclass(frozen=True)
class HostModel:
    """Coefficients by algorithm, in µs and µs a byte, in the order of `FEATURES`."""

    host: Host
    coefficients: Mapping[str, tuple[float, ...]]

    def predict_us(self, algorithm: str, total_bytes: int, cp_size: int) -> float:
        """Time of one gather. Raises KeyError for an algorithm that was not fitted."""
        weights = self.coefficients[algorithm]
        counted = features(algorithm, total_bytes, cp_size, self.host)
        return sum(w * x for w, x in zip(weights, counted, strict=True))
