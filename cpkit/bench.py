"""Time calls inside the ranks.

A sample is the time of one call on one rank. It begins after a barrier, so that the ranks start
together. The time of a collective is that of its slowest rank. Compared calls are interleaved, so
that other load on the machine affects all of them equally.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping

from cpkit import stages
from cpkit.devices import finish
from cpkit.group import CPGroup
from cpkit.timing import Timing

Call = Callable[[], object]
_VALUES_PER_EXCHANGE = 512


def time_calls(
    calls: Mapping[str, Call],
    group: CPGroup,
    iterations: int,
    warmup: int = 2,
    timings: dict[str, Timing] | None = None,
) -> dict[str, Timing]:
    """Time several calls, interleaved: A B C, A B C, … Collective over the group.

    Appends the samples to `timings` if it is passed.
    """
    timings = {name: Timing() for name in calls} if timings is None else timings
    for iteration in range(warmup + iterations):
        for name, call in calls.items():
            time_us, stages_us = _time_once(call, group)
            if iteration >= warmup:
                timings[name].add(time_us, stages_us)
    return timings


def time_for(
    budget_s: float,
    calls: Mapping[str, Call],
    group: CPGroup,
    at_most: int,
    timings: dict[str, Timing] | None = None,
) -> dict[str, Timing]:
    """Time calls for about `budget_s` seconds, in batches that double. Collective.

    After each batch the ranks agree on whether there is time for the next one.
    """
    timings = {name: Timing() for name in calls} if timings is None else timings
    start_s, done = time.monotonic(), 0
    while done < at_most:
        batch = min(done or 1, at_most - done)
        time_calls(calls, group, batch, 0, timings)
        done += batch
        if longest_s(time.monotonic() - start_s, group) > budget_s / 2:
            break  # the next batch would take as long as all batches so far
    return timings


def longest_s(elapsed_s: float, group: CPGroup) -> float:
    """Return the largest value of all ranks, on every rank. Collective."""
    answers = group.exchange(struct.pack("d", elapsed_s))
    return max(float(struct.unpack("d", answer)[0]) for answer in answers)


def all_ranks(timing: Timing, group: CPGroup) -> list[Timing]:
    """Return every rank's timing, by rank, on every rank. Collective.

    All ranks must have the same number of samples, of the same stages.
    """
    count = len(timing.times_us)
    flat = [*timing.times_us, *(us for samples in timing.stages_us.values() for us in samples)]
    per_rank: list[list[float]] = [[] for _ in range(group.size)]
    for start in range(0, len(flat), _VALUES_PER_EXCHANGE):
        values = flat[start : start + _VALUES_PER_EXCHANGE]
        for rank, answer in enumerate(group.exchange(struct.pack(f"{len(values)}d", *values))):
            per_rank[rank].extend(struct.unpack(f"{len(values)}d", answer))
    timings = []
    for values in per_rank:
        times_us, *stages_us = (values[i : i + count] for i in range(0, len(values), count))
        timings.append(Timing(times_us, dict(zip(timing.stages_us, stages_us, strict=True))))
    return timings


def _time_once(call: Call, group: CPGroup) -> tuple[float, dict[str, float]]:
    with stages.record() as recorder:
        group.barrier()
        start_ns = time.perf_counter_ns()
        result = call()
        finish()
        stop_ns = time.perf_counter_ns()
    del result  # only now, because freeing memory is not part of the gather
    return (stop_ns - start_ns) / 1e3, recorder.total_us()
