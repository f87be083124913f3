"""Ordinary memory instead of a pool, for groups and batches without symmetric memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpkit.group import CPGroup
from cpkit.memory.path import PathReport
from cpkit.stages import stage
from cpkit.sync.collective import torch_all_gather

ASYMMETRIC_BATCH = (
    "symmetric memory was switched off for this batch (is_allocation_symmetric() is false)"
)


class OrdinaryMemory:
    """Memory with the interface of a pool; `reason` says why the group has no pool here."""

    is_symmetric = False

    def __init__(self, group: CPGroup, device: torch.device, reason: str) -> None:
        self.group, self.device = group, device
        self._report = PathReport("fallback", reason, "ordinary memory", "ordinary memory")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate as torch.empty does."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def all_gather(
        self,
        shards: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        symmetric_send: bool = False,
        symmetric_recv: bool = False,
    ) -> PathReport:
        """Gather equal shards with the collective of torch.distributed. Collective."""
        with stage("wire"):
            for output, shard in zip(outputs, shards, strict=True):
                torch_all_gather(output, shard, self.group)
        return self._report


def spanning_machines(group: CPGroup) -> str:
    """Return why a group that spans machines has no symmetric memory."""
    return f"the group spans machines (ranks {list(group.ranks)}), which cannot share memory"
