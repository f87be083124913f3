"""Time interleaved workloads: a stream of samples (`Measure`), or a table (`Sweep`)."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby

import msgspec

from cpkit.bench import Call, add_stages, longest_s, time_calls, time_for, time_once
from cpkit.control.messages import (
    Body,
    Done,
    Measure,
    Progress,
    ReplyBody,
    Sample,
    Sweep,
    SweepResult,
    Workload,
)
from cpkit.group import CPGroup
from cpkit.memory.path import PathReport
from cpkit.settings import worker_device
from cpkit.timing import Timing, percentile
from cpkit.worker.operation import CHUNK_S, SHORT_S, Operation, RankState, Steps
from cpkit.worker.workload import Run, prepare

_FIRST_ITERATIONS = 3
_BUSY = 0.25  # of a stream's interval: the ranks leave the cores to the page that draws
_DRAWN_S = 0.15  # in which a page draws the first sample of a setting
_MAX_ITERATIONS, _MAX_STAGE_SAMPLES = 1000, 30
_STAGES_EVERY = 4  # samples


class MeasureOperation(Operation[Measure]):
    """Stream samples. The first have few iterations, to arrive early; later ones fill a step, or
    less of a stream's interval.

    If there is no last sample, the first ones have one iteration. A step of long gathers is one
    gather, so that other clients need not wait for all workloads.
    """

    def cp_size(self) -> int:
        """Return the cp_size of all workloads."""
        return self.body.workloads[0].cp_size

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Verify all workloads, then take one sample of each per step."""
        runs = _variants(self.body.workloads, group, state)
        paths = yield from _verified(runs, group)
        calls = _calls(runs)
        timings = yield from _once_each(calls, group)
        is_quick = _round_s(timings, group) * _FIRST_ITERATIONS < CHUNK_S
        if is_quick:
            iterations = 1 if self.body.samples is None else _FIRST_ITERATIONS
            timings = time_calls(calls, group, iterations, warmup=0)
            _update_stages(calls, group, timings)
        for sequence in count() if self.body.samples is None else range(self.body.samples - 1):
            yield _streamed(runs, sequence, timings, paths)
            budget_s = min(CHUNK_S, self.body.interval_s)
            if _round_s(timings, group) > budget_s:
                timings = yield from _once_each(calls, group)
                continue
            paths = [_path(run) for run in runs]  # the first gather after a pause is slow
            if self.body.samples is None:
                budget_s = min(budget_s, self.body.interval_s * _BUSY)
            last, timings = timings, time_for(budget_s, calls, group, _MAX_ITERATIONS)
            _update_stages(calls, group, timings, last if sequence % _STAGES_EVERY else None)
        return _streamed(runs, (self.body.samples or 1) - 1, timings, paths)

    def interval_s(self, report: ReplyBody) -> float:
        """Return the interval after a sample, longer while a page draws a new setting."""
        if not isinstance(report, SweepResult):
            return 0.0
        is_new = self.body.samples is None and report.rows[0].sequence == 0
        return self.body.interval_s + (min(self.body.interval_s, _DRAWN_S) if is_new else 0)

    def collect(
        self, reports: list[Progress] | list[SweepResult], *, over: bool
    ) -> Iterator[ReplyBody]:
        """Yield one sample per workload, and Done after the last ones."""
        parts = [report for report in reports if isinstance(report, SweepResult)]
        yield from SweepResult.of_all_ranks(parts).rows if parts else reports[:1]
        if over:
            yield Done()


class SweepOperation(Operation[Sweep]):
    """Interleave workloads that differ only in algorithm and memory."""

    def __init__(self, body: Sweep) -> None:
        super().__init__(body)
        self._rows: list[Sample] = []

    def cp_size(self) -> int:
        """Return the cp_size of this part."""
        return self.body.workloads[0].cp_size

    def parts(self) -> Sequence[Body]:
        """Return one request per set of workloads that are interleaved."""
        return [
            Sweep(tuple(variants), self.body.iterations)
            for _, variants in groupby(self.body.workloads, key=Workload.without_variant)
        ]

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Run as many iterations per step as fit in CHUNK_S, at least one."""
        workloads, iterations = self.body.workloads, self.body.iterations
        runs = _variants(workloads, group, state)
        paths = yield from _verified(runs, group)
        calls = _calls(runs)
        warmup = time_calls(calls, group, 1, warmup=0)
        is_short = _round_s(warmup, group) < SHORT_S
        timings = {name: Timing() for name in calls}
        while (done := len(timings["0"].call_us)) < iterations:
            yield Progress(done, iterations, "iterations")
            for run in runs if is_short else ():
                run.gather()
            time_for(CHUNK_S, calls, group, iterations - done, timings)
        samples = zip(workloads, timings.values(), paths, strict=True)
        return SweepResult(tuple(_sample(w, 0, timing, path) for w, timing, path in samples))

    def collect(
        self, reports: list[Progress] | list[SweepResult], *, over: bool
    ) -> Iterator[ReplyBody]:
        """Yield progress in rows; after the last part, all rows."""
        parts = [report for report in reports if isinstance(report, SweepResult)]
        if parts:
            for sample in SweepResult.of_all_ranks(parts).rows:
                self._rows.append(msgspec.structs.replace(sample, sequence=len(self._rows)))
        if over:
            yield SweepResult(tuple(self._rows))
            return
        done, total = len(self._rows), len(self.body.workloads)
        workload, first = self.body.workloads[min(done, total - 1)], reports[0]
        unit = f"rows; now: {workload.total_bytes} bytes, cp_size {workload.cp_size}"
        if isinstance(first, Progress):
            unit = f"{unit}, {first}"
        yield Progress(done, total, unit)


def _variants(workloads: Sequence[Workload], group: CPGroup, state: RankState) -> list[Run]:
    """Return the prepared workloads. They differ only in algorithm and memory, and share rows."""
    first = prepare(workloads[0], group, state.round)
    return [replace(first, workload=workload) for workload in workloads]


def _calls(runs: Sequence[Run]) -> dict[str, Call]:
    return {str(number): run.gather for number, run in enumerate(runs)}


def _verified(runs: Sequence[Run], group: CPGroup) -> Generator[ReplyBody, None, list[PathReport]]:
    """Compare every bit of one gather per workload, and return their paths.

    Ends the step when it has become long.
    """
    paths, start_s = [], time.monotonic()
    for number, run in enumerate(runs, 1):
        run.verified_gather()
        paths.append(run.path())
        if number < len(runs) and longest_s(time.monotonic() - start_s, group) > CHUNK_S:
            yield Progress(number, len(runs), "algorithms verified")
            start_s = time.monotonic()
    return paths


def _once_each(
    calls: Mapping[str, Call], group: CPGroup
) -> Generator[ReplyBody, None, dict[str, Timing]]:
    """Time each call once. Ends the step when it has become long."""
    timings: dict[str, Timing] = {}
    start_s = time.monotonic()
    for name, call in calls.items():
        timings |= time_once({name: call}, group)
        if len(timings) < len(calls) and longest_s(time.monotonic() - start_s, group) > CHUNK_S:
            yield Progress(len(timings), len(calls), "timed in this round")
            start_s = time.monotonic()
    if not all(timing.device_us for timing in timings.values()):
        for timing in timings.values():  # all are compared by the same clock
            timing.device_us.clear()
    return timings


def _update_stages(
    calls: Mapping[str, Call],
    group: CPGroup,
    timings: Mapping[str, Timing],
    last: Mapping[str, Timing] | None = None,
) -> None:
    """Record the stages of the calls, or take those of the `last` timings, which costs no time.

    A quarter as many samples as times, at most 30: enough that the slow first recorded calls do not
    determine the median. On a GPU the timings have stages already.
    """
    if worker_device() == "cuda":
        return
    if last:
        for name, timing in timings.items():
            timing.stages_us = last[name].stages_us
        return
    times = min(len(timing.call_us) for timing in timings.values())
    for _ in range(min(_MAX_STAGE_SAMPLES, (times + 3) // 4)):
        add_stages(calls, group, timings)


def _round_s(timings: Mapping[str, Timing], group: CPGroup) -> float:
    """Return how long one gather of each workload takes on the slowest rank. Collective."""
    return longest_s(sum(timing.median_call_us for timing in timings.values()) / 1e6, group)


def _path(run: Run) -> PathReport:
    run.gather()
    return run.path()


def _streamed(
    runs: Sequence[Run], sequence: int, timings: Mapping[str, Timing], paths: Sequence[PathReport]
) -> SweepResult:
    """Return this rank's part of one sample per workload, with the time of each gather."""
    rows = []
    for run, timing, path in zip(runs, timings.values(), paths, strict=True):
        sample = _sample(run.workload, sequence, timing, path)
        rows.append(msgspec.structs.replace(sample, gathers_us=tuple(timing.times_us)))
    return SweepResult(tuple(rows))


def _sample(workload: Workload, sequence: int, timing: Timing, path: PathReport) -> Sample:
    """Return this rank's part of a sample."""
    return Sample(
        workload=workload,
        sequence=sequence,
        iterations=len(timing.times_us),
        clock=timing.clock,
        per_rank_us=(timing.median_us,),
        per_rank_min_us=(min(timing.times_us),),
        per_rank_p95_us=(percentile(timing.times_us, 95),),
        per_rank_call_us=(timing.median_call_us,),
        stage_us={name: (us,) for name, us in timing.stage_medians_us().items()},
        path=path.path,
        path_reason=path.reason,
    )
