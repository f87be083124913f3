"""Time calls inside the ranks, by two clocks.

*Call time* is what a caller waits: from a barrier, so that the ranks start together, until the call
has returned and the GPU has finished. *Device time* is the work on the GPU alone. It is measured
between events around calls that the host queues ahead, while a pause keeps the GPU busy:

    host     pause ─ align ─ event ─ A ─ event ─ B ─ event   still pausing? then the host was ahead
    stream   ═══════ pause ═══════════════════════│ align │ A │ B │

Called eagerly, a small gather takes as long as Python takes to launch it, so call time says little
about an algorithm there. A serving engine captures its calls in CUDA graphs and pays device time.
Without a GPU, call time is the only clock.

The time of a collective is that of its slowest rank. Compared calls are interleaved, so that other
load on the machine affects all of them equally. A call repeats on the same rows, so what fits into
the caches is read from there.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch

from cpkit import stages
from cpkit.devices import finish
from cpkit.group import CPGroup
from cpkit.settings import worker_device
from cpkit.timing import Timing

Call = Callable[[], object]
_VALUES_PER_EXCHANGE = 512
_BLOCK_S = 0.02  # of call time that is queued behind one pause
_PAUSES = (2, 4, 8)  # first to last pause, in multiples of the time that the host should need
_CYCLES_PER_S = 2e9  # at least the clock rate of any GPU, so a pause is never too short


def time_calls(
    calls: Mapping[str, Call],
    group: CPGroup,
    iterations: int,
    warmup: int = 2,
    timings: dict[str, Timing] | None = None,
) -> dict[str, Timing]:
    """Time several calls, interleaved: A B C, A B C, … Collective over the group.

    Workers on a GPU also measure device time, as many samples, and record the stages. On the CPU no
    stages are recorded. Appends the samples to `timings` if it is passed.
    """
    timings = {name: Timing() for name in calls} if timings is None else timings
    on_gpu = worker_device() == "cuda"
    gave_up = any(each.call_us and not each.device_us for each in timings.values())
    for iteration in range(warmup + iterations):
        for name, call in calls.items():
            time_us = _call_us(call, group)
            if iteration >= warmup:
                timings[name].call_us.append(time_us)
    if on_gpu and iterations and not gave_up:
        add_device_times(calls, group, iterations, timings)
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


def time_once(calls: Mapping[str, Call], group: CPGroup) -> dict[str, Timing]:
    """Time and record each call once: for calls that take too long to be made twice. Collective."""
    if worker_device() == "cuda":
        return time_calls(calls, group, 1, warmup=0)
    timings = {name: Timing() for name in calls}
    for name, call in calls.items():
        time_us, stages_us = _recorded(call, group)
        timings[name].call_us.append(time_us)
        timings[name].add_stages(stages_us)
    return timings


def add_stages(calls: Mapping[str, Call], group: CPGroup, timings: Mapping[str, Timing]) -> None:
    """Append one sample of the stages of each call, as the host sees them. Collective.

    These calls are not timed, because a recorded call takes every step, even when it is repeated
    (cpkit.repeat).
    """
    for name, call in calls.items():
        timings[name].add_stages(_recorded(call, group)[1])


def longest_s(elapsed_s: float, group: CPGroup) -> float:
    """Return the largest value of all ranks, on every rank. Collective."""
    answers = group.exchange(struct.pack("d", elapsed_s))
    return max(float(struct.unpack("d", answer)[0]) for answer in answers)


def all_ranks(timing: Timing, group: CPGroup) -> list[Timing]:
    """Return every rank's timing, by rank, on every rank. Collective.

    All ranks must have the same number of samples, of the same stages.
    """
    lists = [timing.call_us, timing.device_us, *timing.stages_us.values()]
    flat = [us for samples in lists for us in samples]
    per_rank: list[list[float]] = [[] for _ in range(group.size)]
    for start in range(0, len(flat), _VALUES_PER_EXCHANGE):
        values = flat[start : start + _VALUES_PER_EXCHANGE]
        for rank, answer in enumerate(group.exchange(struct.pack(f"{len(values)}d", *values))):
            per_rank[rank].extend(struct.unpack(f"{len(values)}d", answer))
    timings = []
    for values in per_rank:
        rest = iter(values)
        call_us, device_us, *stages_us = ([next(rest) for _ in samples] for samples in lists)
        by_name = dict(zip(timing.stages_us, stages_us, strict=True))
        timings.append(Timing(call_us, device_us, by_name))
    return timings


# ----------------------------------------------------------------------------- call time


def _recorded(call: Call, group: CPGroup) -> tuple[float, dict[str, float]]:
    with stages.record() as recorder:
        time_us = _call_us(call, group)
    return time_us, recorder.total_us()


def _call_us(call: Call, group: CPGroup) -> float:
    finish()
    group.barrier()
    start_ns = time.perf_counter_ns()
    result = call()
    finish()
    stop_ns = time.perf_counter_ns()
    del result  # only now, because freeing memory is not part of the gather
    return (stop_ns - start_ns) / 1e3


# --------------------------------------------------------------------------- device time


def add_device_times(
    calls: Mapping[str, Call], group: CPGroup, iterations: int, timings: Mapping[str, Timing]
) -> None:
    """Append `iterations` samples of device time to each timing, which has samples of call time.

    Collective. The stages, whose events would lengthen the calls, are measured apart: one sample is
    the mean over the calls behind one pause. When a call waits for the GPU, as one does whose rows
    go through the host, no call gets device time, so that all are compared by call time.
    """
    round_s = longest_s(sum(timings[name].median_call_us for name in calls) / 1e6, group)
    at_once, done = max(1, int(_BLOCK_S / round_s)), 0
    while done < iterations:
        rounds = min(at_once, iterations - done)
        queue = [call for _ in range(rounds) for call in calls.values()]
        queued = _queue(queue, group, rounds * round_s)
        if queued is None:
            add_stages(calls, group, timings)
            return
        for name, device_us in zip([*calls] * rounds, queued[0], strict=True):
            timings[name].device_us.append(device_us)
        done += rounds
    for name, call in calls.items():
        call_s = timings[name].median_call_us / 1e6
        rounds = max(1, min(iterations, int(_BLOCK_S / longest_s(call_s, group))))
        queued = _queue([call] * rounds, group, rounds * call_s, with_stages=True)
        if queued is not None:
            timings[name].add_stages(queued[1])


def _queue(
    queue: Sequence[Call], group: CPGroup, expected_s: float, *, with_stages: bool = False
) -> tuple[list[float], dict[str, float]] | None:
    """Return the µs on the GPU of each call, in order, and the mean of each stage. Collective.

    The first call runs once more before them, so that all streams begin together. The pause grows
    until the host of every rank has queued all calls before it ended; None if it never has.
    """
    for pause_s in [factor * (expected_s + 1e-3) for factor in _PAUSES]:
        finish()
        group.barrier()
        with stages.record() if with_stages else nullcontext() as recorder:
            torch.cuda._sleep(int(pause_s * _CYCLES_PER_S))
            paused = _event()
            queue[0]()
            events = [_event()]
            for call in queue:
                call()
                events.append(_event())
            was_behind = paused.query()
        finish()
        if not longest_s(float(was_behind), group):
            samples = [float(start.elapsed_time(stop)) * 1e3 for start, stop in pairwise(events)]
            totals_us = recorder.total_us() if recorder else {}
            return samples, {stage: us / (len(queue) + 1) for stage, us in totals_us.items()}
    return None


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
