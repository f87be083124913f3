"""Time one workload repeatedly (`Measure`), or several interleaved ones (`Sweep`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, groupby

import msgspec

from cpkit.bench import time_calls, time_for
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
from cpkit.timing import Timing, percentile
from cpkit.worker.operation import CHUNK_S, Operation, RankState, Steps
from cpkit.worker.workload import prepare

_FIRST_ITERATIONS = 3
_MAX_ITERATIONS = 1000


class MeasureOperation(Operation[Measure]):
    """Stream samples. The first has few iterations, to arrive early; later ones fill a step."""

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Take one sample per step."""
        workload = self.body.workload
        run = prepare(workload, group, state.round)
        run.verified_gather()
        calls = {"": run.gather}
        timing = time_calls(calls, group, _FIRST_ITERATIONS, warmup=0)[""]
        for sequence in count() if self.body.samples is None else range(self.body.samples - 1):
            yield _sample(workload, sequence, timing, run.path())
            run.gather()  # the first gather after a pause is slow
            budget_s = min(CHUNK_S, self.body.interval_s)
            timing = time_for(budget_s, calls, group, _MAX_ITERATIONS)[""]
        return _sample(workload, (self.body.samples or 1) - 1, timing, run.path())

    def collect(self, reports: list[Sample], *, over: bool) -> Iterator[ReplyBody]:
        """Yield one sample, and Done after the last one."""
        yield Sample.of_all_ranks(reports)
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
            for _, variants in groupby(self.body.workloads, key=_without_variant)
        ]

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Run as many iterations per step as fit in CHUNK_S."""
        workloads, iterations = self.body.workloads, self.body.iterations
        first = prepare(workloads[0], group, state.round)
        runs = [replace(first, workload=workload) for workload in workloads]
        paths = []
        for run in runs:
            run.verified_gather()
            paths.append(run.path())
            yield Progress(0, iterations)
        calls = {str(number): run.gather for number, run in enumerate(runs)}
        timings = time_calls(calls, group, 1)
        while (done := len(timings["0"].call_us)) < iterations:
            yield Progress(done, iterations)
            for run in runs:
                run.gather()  # the first gather after a step of another request is slow
            time_for(CHUNK_S, calls, group, iterations - done, timings)
        samples = zip(workloads, timings.values(), paths, strict=True)
        return SweepResult(tuple(_sample(w, 0, timing, path) for w, timing, path in samples))

    def collect(
        self, reports: list[Progress] | list[SweepResult], *, over: bool
    ) -> Iterator[ReplyBody]:
        """Yield progress in workloads; after the last part, all rows."""
        parts = [report for report in reports if isinstance(report, SweepResult)]
        if parts:
            for sample in SweepResult.of_all_ranks(parts).rows:
                self._rows.append(msgspec.structs.replace(sample, sequence=len(self._rows)))
        if over:
            yield SweepResult(tuple(self._rows))
            return
        done, total = len(self._rows), len(self.body.workloads)
        workload = self.body.workloads[min(done, total - 1)]
        yield Progress(done, total, f"{workload.total_bytes} bytes, cp_size {workload.cp_size}")


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


def _without_variant(workload: Workload) -> Workload:
    return msgspec.structs.replace(workload, algorithm="direct", symmetric=True)
