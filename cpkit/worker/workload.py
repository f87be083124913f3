"""A workload on one rank: stamp its rows, gather them, and check the result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cpkit import provenance
from cpkit.control.messages import Workload
from cpkit.control.requests import DTYPE_BYTES
from cpkit.devices import Replay, finish
from cpkit.gather import all_gather_kv, last_path
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import as_rows
from cpkit.memory.path import PathReport
from cpkit.plan import GatherPlan, plan_gather_kv
from cpkit.settings import worker_device
from cpkit.stages import keep
from cpkit.symm import batch_symmetry

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}


@dataclass
class Run:
    """A prepared workload on one rank, to gather any number of times."""

    workload: Workload
    metadata: ContextParallelMetadata
    group: CPGroup
    round: int
    tensors: list[torch.Tensor]
    _plan: GatherPlan | None = field(default=None, init=False, repr=False)
    _replay: Replay[list[torch.Tensor]] | None = field(default=None, init=False, repr=False)
    _captured_path: PathReport | None = field(default=None, init=False, repr=False)

    def gather(self) -> list[torch.Tensor]:
        """Return all tensors in token order. Collective."""
        return self._captured()() if self.workload.captured else self._call()

    def _captured(self) -> Replay[list[torch.Tensor]]:
        """Return the captured gather, made in the first call. Collective.

        The gather runs once before, because pools, kernels and tables cannot be made in a capture.
        """
        if self._replay is None:
            self._call()
            self._captured_path = self._latest_path()
            if self._captured_path.path == "fallback" and not self.group.has_nccl:
                raise ValueError(
                    "captured is True, and without symmetric memory the rows of ranks that share a "
                    "GPU go through the host, which cannot be captured: use symmetric memory, or "
                    "measure without captured"
                )
            self._replay = Replay(self._call)
        return self._replay

    def _call(self) -> list[torch.Tensor]:
        with batch_symmetry(self.workload.symmetric):
            if self.workload.algorithm == "plan":
                return self._call_plan()
            return all_gather_kv(
                self.tensors, self.metadata, self.group, algorithm=self.workload.algorithm
            )

    def prepare_plan(self) -> GatherPlan:
        """Return the plan of algorithm "plan", created in the first call. Collective."""
        if self._plan is None:
            with batch_symmetry(self.workload.symmetric):
                self._plan = plan_gather_kv(self.tensors, self.metadata, self.group)
        return self._plan

    def _call_plan(self) -> list[torch.Tensor]:
        gathered = self.prepare_plan()()
        keep("shard", self.tensors[0])
        keep("wire", gathered[0])
        return gathered

    def verified_gather(self) -> list[torch.Tensor]:
        """Gather, and compare every bit. Raises ProvenanceError. Collective."""
        if self.workload.captured:
            for tensor in self._captured().result:  # which the eager gather may have filled
                provenance.poison_(tensor)
            finish()
            self.group.barrier()  # otherwise a peer could store rows before they are poisoned
        gathered = self.gather()
        for number, tensor in enumerate(gathered):
            if not self._is_expected(tensor, number):
                provenance.check(tensor, self.metadata, round=self.round, tensor=number)
        return gathered

    def _is_expected(self, tensor: torch.Tensor, number: int) -> bool:
        """Return True if every bit is right. Ten times faster than `provenance.check`."""
        want = provenance.expected_rows(
            self.metadata, tensor.shape[1:], tensor.dtype, round=self.round, tensor=number
        )
        got_rows, want_rows = as_rows(tensor), as_rows(want.to(tensor.device))
        return got_rows.dtype == want_rows.dtype and torch.equal(got_rows, want_rows)

    def path(self) -> PathReport:
        """Return the path of the latest gather on this rank, or of the captured one."""
        return self._captured_path or self._latest_path()

    def _latest_path(self) -> PathReport:
        report = last_path(self.group)
        if report is None:
            raise RuntimeError("there is no path before the first gather")
        return report


def prepare(workload: Workload, group: CPGroup, round_number: int) -> Run:
    """Stamp this rank's rows, and return the prepared workload. Local."""
    metadata = workload.layout()
    shape, dtype = (workload.heads, workload.head_dim), DTYPES[workload.dtype]
    tensors = [
        provenance.shard_rows(metadata, group.rank, shape, dtype, round=round_number, tensor=n).to(
            worker_device()
        )
        for n in range(workload.tensors)
    ]
    return Run(workload, metadata, group, round_number, tensors)
