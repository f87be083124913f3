"""Timing a workload again and again (`Measure`), or several side by side (`Sweep`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby

import msgspec

from cpkit.bench import Call, Timing, time_calls
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
from cpkit.worker.operation import Operation, RankState, Steps, Timed
from cpkit.worker.workload import longest_s, prepare, timed

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
            run.gather()  # after a rest, the first one is slow
            budget_s = min(_CHUNK_S, self.body.interval_s)
            timing = _time_for(budget_s, {"": run.gather}, group, _MAX_ITERATIONS)[""]
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
        first = prepare(self.body.workloads[0], group, state.round)
        runs = [replace(first, workload=workload) for workload in self.body.workloads]
        calls = {str(number): run.gather for number, run in enumerate(runs)}
        paths = []
        for run in runs:
            run.verified_gather()
            paths.append(run.path())
            yield SweepReport(0)
        parts = [time_calls(calls, group, 1)]
        done = 1
        while done < self.body.iterations:
            yield SweepReport(done)
            parts.append(_time_for(_CHUNK_S, calls, group, self.body.iterations - done))
            done += len(parts[-1]["0"].times_us)
        return SweepReport(done, tuple(map(timed, _joined(parts).values(), paths)))

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


def _time_for(
    budget_s: float, calls: Mapping[str, Call], group: CPGroup, at_most: int
) -> dict[str, Timing]:
    """Time calls for about `budget_s`, in batches that double, however slow they turn out to be.

    Ranks agree after each batch whether there is time for the next one. Collective.
    """
    start, done, parts = time.monotonic(), 0, []
    while done < at_most:
        parts.append(time_calls(calls, group, min(done or 1, at_most - done), warmup=0))
        done += len(parts[-1][next(iter(calls))].times_us)
        if longest_s(time.monotonic() - start, group) > budget_s / 2:
            break  # the next batch would take as long as all until now
    return _joined(parts)


def _joined(parts: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Consecutive timings of the same calls as one."""
    return {name: _one_after_the_other([part[name] for part in parts]) for name in parts[0]}


def _one_after_the_other(parts: Sequence[Timing]) -> Timing:
    times = tuple(t for part in parts for t in part.times_us)
    names = dict.fromkeys(name for part in parts for name in part.stage_us)
    stages = {
        name: tuple(t for part in parts for t in part.stage_us.get(name, ())) for name in names
    }
    return Timing(times, stages)
