"""Timing done right, for code that runs inside a rank.

Every sample begins at a barrier, so that ranks start together, and is the time of one call on one
rank; the slowest rank counts. Medians, never means of rates. Variants that are compared are
interleaved, so that a noisy neighbour meets all of them.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cpkit import stages
from cpkit.devices import finish
from cpkit.group import CPGroup

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Samples of one variant on this rank: `[iterations]` µs, and the same for every stage."""

    times_us: tuple[float, ...]
    stage_us: Mapping[str, tuple[float, ...]]

    @property
    def median_us(self) -> float:
        """Half of the samples took no longer."""
        return statistics.median(self.times_us)

    @property
    def min_us(self) -> float:
        """The fastest sample."""
        return min(self.times_us)

    @property
    def p95_us(self) -> float:
        """95 % of the samples took no longer."""
        return percentile(self.times_us, 95)

    def stage_medians_us(self) -> dict[str, float]:
        """Median of each stage by itself; they need not add up to the median of the whole."""
        return {name: statistics.median(values) for name, values in self.stage_us.items()}


def time_calls(
    calls: Mapping[str, Call], group: CPGroup, iterations: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time several variants, interleaved: A B C, A B C, … Collective over the group."""
    samples: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in calls}
    for iteration in range(warmup + iterations):
        for name, call in calls.items():
            sample = _time_once(call, group)
            if iteration >= warmup:
                samples[name].append(sample)
    return {name: _timing(values) for name, values in samples.items()}


def _time_once(call: Call, group: CPGroup) -> tuple[float, dict[str, float]]:
    with stages.record() as recorder:
        group.barrier()
        start_ns = time.perf_counter_ns()
        result = call()
        finish()
        stop_ns = time.perf_counter_ns()
    del result  # outside the clock: giving memory back is not part of the gather
    return (stop_ns - start_ns) / 1e3, recorder.total_us()


def _timing(samples: Sequence[tuple[float, dict[str, float]]]) -> Timing:
    names = dict.fromkeys(name for _, stage_us in samples for name in stage_us)
    return Timing(
        tuple(time_us for time_us, _ in samples),
        {name: tuple(stage_us.get(name, 0.0) for _, stage_us in samples) for name in names},
    )


def slowest(timing: Timing, group: CPGroup) -> Timing:
    """The timing of the rank with the largest median, on every rank. Collective.

    Stages of that same rank, so that they still add up to its total.
    """
    return max(everybody(timing, group), key=lambda each: each.median_us)


def everybody(timing: Timing, group: CPGroup) -> list[Timing]:
    """Every rank's timing, by rank, on every rank. Collective; stages are alike on all."""
    per_rank: list[list[float]] = [[] for _ in range(group.size)]
    flat = [*timing.times_us, *(v for values in timing.stage_us.values() for v in values)]
    for start in range(0, len(flat), 512):
        note = struct.pack(f"{len(flat[start : start + 512])}d", *flat[start : start + 512])
        for rank, answer in enumerate(group.exchange(note)):
            per_rank[rank].extend(value for (value,) in struct.iter_unpack("d", answer))
    return [_unflatten(values, timing) for values in per_rank]


def _unflatten(values: list[float], like: Timing) -> Timing:
    count = len(like.times_us)
    rows = [tuple(values[i : i + count]) for i in range(0, len(values), count)]
    return Timing(rows[0], dict(zip(like.stage_us, rows[1:], strict=True)))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the sorted values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def algbw_gbps(total_bytes: int, time_us: float) -> float:
    """nccl-tests' algbw in GB/s (1e9): S / t, where S is the size of the whole gathered result."""
    return total_bytes / time_us / 1e3


def busbw_gbps(total_bytes: int, time_us: float, cp_size: int) -> float:
    """nccl-tests' busbw in GB/s (1e9): algbw · (n-1)/n, what a link has to carry."""
    return algbw_gbps(total_bytes, time_us) * (cp_size - 1) / cp_size
