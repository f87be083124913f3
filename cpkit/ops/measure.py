"""Timing a workload again and again (`Measure`), or several side by side (`Sweep`)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import count, groupby

import msgspec

from cpkit.bench import Timing, time_calls
from cpkit.control.messages import (
    Body,
    Measure,
    MeasureResult,
    Message,
    Progress,
    ReplyBody,
    Sample,
    Sweep,
    SweepResult,
    Workload,
)
from cpkit.group import CPGroup
from cpkit.ops.base import Operation, RankState, Steps, Timed
from cpkit.ops.workload import Run, prepare, timed
from cpkit.path import PathReport

_CHUNK_S = 0.05  # work between two looks at the clock, and at who else waits
_FIRST_ITERATIONS = 3
_MAX_ITERATIONS = 1000


class MeasureOperation(Operation[Measure, Timed]):
    """The first sample comes quickly, from few gathers; later ones fill their interval."""

    report = Timed

    def __init__(self, body: Measure) -> None:
        super().__init__(body)
        self._sent = 0

    def steps(self, group: CPGroup, state: RankState) -> Steps[Timed]:
        """One step a sample."""
        run = prepare(self.body.workload, group, state.round)
        run.verified_gather()
        timing = time_calls({"": run.gather}, group, _FIRST_ITERATIONS, warmup=0)[""]
        for _ in count() if self.body.samples is None else range(self.body.samples - 1):
            yield timed(timing, run.path())
            iterations = _agreed_iterations(timing, group, min(_CHUNK_S, self.body.interval_s))
            timing = time_calls({"": run.gather}, group, iterations, warmup=1)[""]
        return timed(timing, run.path())

    def collect(self, reports: list[Timed], *, over: bool) -> Iterator[ReplyBody]:
        """One sample, and the end after the last."""
        yield sample_of(self.body.workload, reports, self._sent)
        self._sent += 1
        if over:
            yield MeasureResult(self._sent)


class SweepReport(Message, frozen=True):
    """One rank's progress, with its times once they are complete: one for each workload."""

    done: int
    timed: tuple[Timed, ...] = ()


class SweepOperation(Operation[Sweep, SweepReport]):
    """Workloads that differ only in algorithm and memory are interleaved: noise meets all."""

    report = SweepReport

    def __init__(self, body: Sweep) -> None:
        super().__init__(body)
        self._rows: list[Sample] = []

    def cp_size(self) -> int:
        """Ranks that take part in this part."""
        return self.body.workloads[0].cp_size

    def parts(self) -> Sequence[Body]:
        """One part for each set of workloads that are interleaved."""
        return [
            Sweep(tuple(variants), self.body.iterations)
            for _, variants in groupby(self.body.workloads, key=_without_variant)
        ]

    def steps(self, group: CPGroup, state: RankState) -> Steps[SweepReport]:
        """As many iterations a step as fit a chunk of time."""
        runs = [prepare(workload, group, state.round) for workload in self.body.workloads]
        calls = {str(number): run.gather for number, run in enumerate(runs)}
        for run in runs:
            run.verified_gather()
        paths = [_path_after(run) for run in runs]
        timings = [time_calls(calls, group, 1)]
        done = 1
        while done < self.body.iterations:
            yield SweepReport(done)
            chunk = _agreed_iterations(_longest(timings[-1]), group, _CHUNK_S / len(runs))
            chunk = min(chunk, self.body.iterations - done)
            timings.append(time_calls(calls, group, chunk, warmup=0))
            done += chunk
        whole = (_joined([part[name] for part in timings]) for name in calls)
        return SweepReport(done, tuple(map(timed, whole, paths)))

    def collect(self, reports: list[SweepReport], *, over: bool) -> Iterator[ReplyBody]:
        """Progress; at the end of the last part, all rows."""
        for variant in range(len(reports[0].timed)):
            workload = self.body.workloads[len(self._rows)]
            times = [report.timed[variant] for report in reports]
            self._rows.append(sample_of(workload, times, len(self._rows)))
        if over:
            yield SweepResult(tuple(self._rows))
        else:
            total = len(self.body.workloads)
            workload = self.body.workloads[min(len(self._rows), total - 1)]
            yield Progress(
                len(self._rows), total, f"{workload.total_bytes} bytes, cp_size {workload.cp_size}"
            )


def sample_of(workload: Workload, reports: list[Timed], sequence: int) -> Sample:
    """One timing from each rank as a sample."""
    names = list(dict.fromkeys(name for report in reports for name in report.stage_us))
    return Sample(
        workload=workload,
        sequence=sequence,
        iterations=reports[0].iterations,
        total_bytes=workload.total_bytes,
        per_rank_us=tuple(report.median_us for report in reports),
        per_rank_min_us=tuple(report.min_us for report in reports),
        per_rank_p95_us=tuple(report.p95_us for report in reports),
        stage_us={
            name: tuple(report.stage_us.get(name, 0.0) for report in reports) for name in names
        },
        path=reports[0].path,
        path_reason=reports[0].path_reason,
    )


def _without_variant(workload: Workload) -> Workload:
    return msgspec.structs.replace(workload, algorithm="direct", symmetric=True)


def _path_after(run: Run) -> PathReport:
    """The path of this run, not of the one that gathered last."""
    run.gather()
    return run.path()


def _agreed_iterations(timing: Timing, group: CPGroup, budget_s: float) -> int:
    """How often the slowest rank can do it in the time; equal on every rank. Collective."""
    mine = struct.pack("d", timing.median_us)
    slowest_us = max(struct.unpack("d", note)[0] for note in group.exchange(mine))
    return max(1, min(_MAX_ITERATIONS, int(budget_s * 1e6 / max(slowest_us, 1.0))))


def _longest(timings: dict[str, Timing]) -> Timing:
    return max(timings.values(), key=lambda timing: timing.median_us)


def _joined(parts: list[Timing]) -> Timing:
    """Consecutive timings of one variant as one."""
    times = tuple(t for part in parts for t in part.times_us)
    names = dict.fromkeys(name for part in parts for name in part.stage_us)
    stages = {
        name: tuple(t for part in parts for t in part.stage_us.get(name, ())) for name in names
    }
    return Timing(times, stages)
