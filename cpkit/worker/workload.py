"""A workload on one rank: its stamped rows, the gather, and the check of what came out."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from cpkit import provenance
from cpkit.bench import Timing
from cpkit.control.messages import Workload
from cpkit.control.requests import DTYPE_BYTES
from cpkit.devices import default_device
from cpkit.gather import all_gather_kv, as_rows, last_path
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.path import PathReport
from cpkit.symm import batch_symmetry
from cpkit.worker.operation import Timed

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}


@dataclass
class Run:
    """A workload ready to be gathered as often as wanted. Every rank of the group has one."""

    workload: Workload
    metadata: ContextParallelMetadata
    group: CPGroup
    round: int
    tensors: list[torch.Tensor]

    def gather(self) -> list[torch.Tensor]:
        """All tensors, in token order. Collective."""
        with batch_symmetry(self.workload.symmetric):
            return all_gather_kv(
                self.tensors, self.metadata, self.group, algorithm=self.workload.algorithm
            )

    def verified_gather(self) -> list[torch.Tensor]:
        """Gather, and compare every bit. Raises ProvenanceError. Collective."""
        gathered = self.gather()
        for number, tensor in enumerate(gathered):
            if not self._is_expected(tensor, number):
                provenance.check(tensor, self.metadata, round=self.round, tensor=number)
        return gathered

    def _is_expected(self, tensor: torch.Tensor, number: int) -> bool:
        """Whether every bit is right; ten times quicker than a check, which can explain."""
        want = provenance.expected_rows(
            self.metadata, tensor.shape[1:], tensor.dtype, round=self.round, tensor=number
        )
        got_rows, want_rows = as_rows(tensor), as_rows(want.to(tensor.device))
        return got_rows.dtype == want_rows.dtype and torch.equal(got_rows, want_rows)

    def path(self) -> PathReport:
        """What the latest gather did on this rank."""
        report = last_path(self.group)
        if report is None:
            raise RuntimeError("there is no path before the first gather")
        return report


def layout_of(workload: Workload) -> ContextParallelMetadata:
    """Who owns which token of it. Raises ValueError for lengths that cannot be laid out."""
    return prepare_context_parallel_metadata(workload.lengths, workload.cp_size, workload.strategy)


def prepare(workload: Workload, group: CPGroup, round_number: int) -> Run:
    """Stamp this rank's rows. Local."""
    metadata = layout_of(workload)
    shape, dtype = (workload.heads, workload.head_dim), DTYPES[workload.dtype]
    tensors = [
        provenance.shard_rows(metadata, group.rank, shape, dtype, round=round_number, tensor=n).to(
            default_device()
        )
        for n in range(workload.tensors)
    ]
    return Run(workload, metadata, group, round_number, tensors)


def longest_s(elapsed_s: float, group: CPGroup) -> float:
    """The largest of all ranks' numbers, on every rank. Collective."""
    notes = group.exchange(struct.pack("d", elapsed_s))
    return max(float(struct.unpack("d", note)[0]) for note in notes)


def timed(timing: Timing, path: PathReport) -> Timed:
    """A timing as a message."""
    return Timed(
        median_us=timing.median_us,
        min_us=timing.min_us,
        p95_us=timing.p95_us,
        iterations=len(timing.times_us),
        stage_us=timing.stage_medians_us(),
        path=path.path,
        path_reason=path.reason,
    )
