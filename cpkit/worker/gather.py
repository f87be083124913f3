"""One gather: verified and shown (`Gather`), as a timeline (`Trace`), its path (`Explain`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cpkit import provenance, stages
from cpkit.bench import time_calls
from cpkit.control.messages import (
    Array,
    Explain,
    ExplainResult,
    Gather,
    GatherResult,
    Message,
    Path,
    PathInfo,
    ReplyBody,
    Span,
    StageArrays,
    Trace,
    TraceResult,
)
from cpkit.devices import default_device, finish
from cpkit.group import CPGroup
from cpkit.symm import symmetric_pool
from cpkit.worker.operation import Operation, RankState
from cpkit.worker.workload import Run, layout_of, prepare

_MAX_SHOWN_SLOTS = 16_384  # over all ranks, of one stage: 2.5 MB for five stages
_ITERATIONS = 5


class GatherReport(Message, frozen=True):
    """One rank's gather."""

    checked_rows: int
    path: Path
    path_reason: str
    time_us: float
    stages: tuple[StageArrays, ...]


class GatherOperation(Operation[Gather, GatherReport]):
    """Gather into poisoned memory, compare every bit, keep the stages, then time it."""

    report = GatherReport

    def only_step(self, group: CPGroup, state: RankState) -> GatherReport:
        """Compare, show, time."""
        run = prepare(self.body.workload, group, self.body.round)
        _poison_pool(run)
        with stages.record(keep_arrays=self._is_shown(run)) as recorder:
            gathered = run.verified_gather()
        finish()
        group.check()
        shown = tuple(_show(name, group.rank, rows) for name, rows in recorder.arrays.items())
        checked = sum(len(tensor) for tensor in gathered)
        del gathered
        timing = time_calls({"": run.gather}, group, _ITERATIONS)[""]
        path = run.path()
        return GatherReport(checked, path.path, path.reason, timing.median_us, shown)

    def collect(self, reports: list[GatherReport], *, over: bool) -> Iterator[ReplyBody]:
        """The result."""
        workload = self.body.workload
        metadata = layout_of(workload)
        yield GatherResult(
            workload=workload,
            round=self.body.round,
            total_bytes=workload.total_bytes,
            per_rank_actual_token=metadata.per_rank_actual_token,
            max_rank_len=metadata.max_rank_len[0],
            checked_rows=sum(report.checked_rows for report in reports),
            path=reports[0].path,
            path_reason=reports[0].path_reason,
            per_rank_us=tuple(report.time_us for report in reports),
            stages=tuple(stage for report in reports for stage in report.stages),
        )

    def _is_shown(self, run: Run) -> bool:
        slots = run.metadata.max_rank_len[0] * run.metadata.cp_size**2
        return self.body.show and slots <= _MAX_SHOWN_SLOTS


class TraceReport(Message, frozen=True):
    """One rank's stages: (name, start, stop) in nanoseconds of the machine's monotonic clock."""

    spans: tuple[stages.Span, ...]
    spans_hosts: bool


class TraceOperation(Operation[Trace, TraceReport]):
    """Record the stages of one warmed-up gather."""

    report = TraceReport

    def only_step(self, group: CPGroup, state: RankState) -> TraceReport:
        """Two gathers to warm up, then the recorded one."""
        run = prepare(self.body.workload, group, state.round)
        for _ in range(2):
            run.verified_gather()
        group.barrier()
        with stages.record() as recorder:
            run.gather()
        return TraceReport(tuple(recorder.spans), group.spans_hosts)

    def collect(self, reports: list[TraceReport], *, over: bool) -> Iterator[ReplyBody]:
        """All spans on one clock, which begins when the first rank enters."""
        first_ns = min(start_ns for report in reports for _, start_ns, _ in report.spans)
        spans = []
        for rank, report in enumerate(reports):
            # Clocks of different machines have nothing in common; each rank then has its own zero.
            zero_ns = report.spans[0][1] if report.spans_hosts else first_ns
            for name, start_ns, stop_ns in report.spans:
                spans.append(
                    Span(rank, name, (start_ns - zero_ns) / 1e3, (stop_ns - zero_ns) / 1e3)
                )
        yield TraceResult(self.body.workload, tuple(spans))


class ExplainOperation(Operation[Explain, PathInfo]):
    """Run the gather, and say which path it took on each rank."""

    report = PathInfo

    def only_step(self, group: CPGroup, state: RankState) -> PathInfo:
        """Gather, and look at the path."""
        run = prepare(self.body.workload, group, state.round)
        run.verified_gather()
        path = run.path()
        return PathInfo(group.rank, path.path, path.reason, path.send, path.recv)

    def collect(self, reports: list[PathInfo], *, over: bool) -> Iterator[ReplyBody]:
        """One row a rank."""
        yield ExplainResult(self.body.workload, tuple(reports))


def _poison_pool(run: Run) -> None:
    """So that a row that nobody writes can't look right. Collective when there is no pool yet."""
    if run.workload.symmetric and not run.group.spans_hosts:
        symmetric_pool(run.group, default_device()).poison_free()
        finish()
        run.group.barrier()  # nobody stores rows into memory that its owner still poisons


def _show(name: str, rank: int, rows: torch.Tensor) -> StageArrays:
    decoded = provenance.decode_rows(rows).cpu()
    return StageArrays(name, rank, Array.of(decoded.numpy()))
