"""Run one gather: verify it (`Gather`), trace it (`Trace`), or report its path (`Explain`)."""

from __future__ import annotations

import torch

from cpkit import provenance, stages
from cpkit.bench import time_calls
from cpkit.control.messages import (
    Array,
    Explain,
    ExplainResult,
    Gather,
    GatherResult,
    StageArray,
    Trace,
    TraceResult,
)
from cpkit.devices import finish
from cpkit.group import CPGroup
from cpkit.memory import nccl_log
from cpkit.memory.nccl_log import Selections
from cpkit.settings import worker_device
from cpkit.symm import symmetric_pool
from cpkit.worker.operation import Operation, RankState
from cpkit.worker.workload import Run, prepare

_MAX_SHOWN_SLOTS = 16_384  # per stage, over all ranks: 2.5 MB for five stages
_ITERATIONS = 5


class GatherOperation(Operation[Gather]):
    """Gather into poisoned memory, compare every bit, record the stages, then time the gather."""

    def only_step(self, group: CPGroup, state: RankState) -> GatherResult:
        """Return this rank's part of a verified gather."""
        run = prepare(self.body.workload, group, self.body.round)
        poison_pool(run)
        with stages.record(keep_arrays=self._is_shown(run)) as recorder:
            gathered = run.verified_gather()
        finish()
        group.check()
        arrays = tuple(_array(name, group.rank, rows) for name, rows in recorder.arrays.items())
        checked_rows = sum(len(tensor) for tensor in gathered)
        del gathered
        timing = time_calls({"": run.gather}, group, _ITERATIONS)[""]
        path = run.path()
        return GatherResult(
            workload=self.body.workload,
            round=self.body.round,
            per_rank_actual_token=run.metadata.per_rank_actual_token,
            max_rank_len=run.metadata.max_rank_len[0],
            checked_rows=checked_rows,
            path=path.path,
            path_reason=path.reason,
            clock=timing.clock,
            per_rank_us=(timing.median_us,),
            arrays=arrays,
        )

    def _is_shown(self, run: Run) -> bool:
        slots = run.metadata.max_rank_len[0] * run.metadata.cp_size**2
        return self.body.show and slots <= _MAX_SHOWN_SLOTS


class TraceOperation(Operation[Trace]):
    """Record the stages of one warmed-up gather."""

    def only_step(self, group: CPGroup, state: RankState) -> TraceResult:
        """Gather twice to warm up, then return the spans of a third gather."""
        run = prepare(self.body.workload, group, state.round)
        for _ in range(2):
            run.verified_gather()
        group.barrier()
        with stages.record() as recorder:
            run.gather()
        return TraceResult(self.body.workload, (tuple(recorder.spans),), group.spans_hosts)


class ExplainOperation(Operation[Explain]):
    """Run the gather, and report its path, and what NCCL selected."""

    def only_step(self, group: CPGroup, state: RankState) -> ExplainResult:
        """Gather, and return the path on this rank."""
        run = prepare(self.body.workload, group, state.round)
        run.verified_gather()
        observed = (_observe(run),) if self.body.observe else ()
        return ExplainResult(self.body.workload, (run.path(),), observed)


def _observe(run: Run) -> Selections:
    """Gather once more, and return what NCCL selected for it on this rank. Collective.

    The first gather is not observed, because making a pool calls NCCL too.
    """
    if worker_device() == "cpu":
        return Selections(reason="the ranks are on the CPU, without NCCL")
    if not run.group.has_nccl:
        why = "ranks share a GPU" if run.group.shares_gpu else "this torch has no NCCL"
        return Selections(reason=f"NCCL is not used, because {why}")

    def gather() -> None:
        run.verified_gather()
        finish()

    seen = nccl_log.observe(gather)
    if seen.calls or seen.reason:
        return seen
    if run.group.rank > 0:
        return Selections(reason="NCCL logs its selections on rank 0")
    return Selections(reason="NCCL was not called, because cpkit moved the rows")


def poison_pool(run: Run) -> None:
    """Overwrite free pool memory, so that rows which the gather misses are detected. Collective."""
    if run.workload.symmetric and not run.group.spans_hosts:
        symmetric_pool(run.group, worker_device()).poison_free()
        finish()
        run.group.barrier()  # otherwise a peer could store rows into memory before it is poisoned


def _array(name: str, rank: int, rows: torch.Tensor) -> StageArray:
    decoded = provenance.decode_rows(rows).cpu()
    return StageArray(name, rank, Array.of(decoded.numpy()))
