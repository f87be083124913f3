"""A gather algorithm of one's own: a ring, in which each rank passes on what it has received.

    ./launch_workers.sh --algorithms examples/ring.py

In step s, rank r sends the rows of rank r-s to rank r+1. After cp_size-1 steps every rank has the
rows of all ranks:

    step 1   0 ─rows of 0─▶ 1 ─rows of 1─▶ 2 ─rows of 2─▶ 0
    step 2   0 ─rows of 2─▶ 1 ─rows of 0─▶ 2 ─rows of 1─▶ 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cpkit.gather import Gathered, Memory
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.path import PathReport
from cpkit.stages import stage

__all__ = ["ring"]  # the algorithms; other functions are helpers


def ring(
    tensors: Sequence[torch.Tensor], metadata: ContextParallelMetadata, memory: Memory
) -> Gathered:
    """Gather `[rows, …]` each to `[total_tokens, …]` each, without padding."""
    outputs = [ring_of_one(x.contiguous(), metadata, memory.group) for x in tensors]
    reason = "a ring of sends and receives, in ordinary memory"
    return outputs, PathReport("fallback", reason, "ordinary memory", "ordinary memory")


def ring_of_one(
    rows: torch.Tensor, metadata: ContextParallelMetadata, group: CPGroup
) -> torch.Tensor:
    """Gather one tensor; each step also stores rows at their place in token order."""
    output = rows.new_empty(metadata.total_tokens, *rows.shape[1:])
    right, left = (group.ranks[(group.rank + step) % group.size] for step in (1, -1))
    for step in range(group.size):
        owner = (group.rank - step) % group.size
        with stage("reorder"):
            output[metadata.rank_rows(owner).to(rows.device)] = rows
        if step < group.size - 1:
            with stage("wire"):
                count = metadata.per_rank_actual_token[(owner - 1) % group.size]
                received = rows.new_empty(count, *rows.shape[1:])
                send = dist.P2POp(dist.isend, rows, right, group.process_group)
                receive = dist.P2POp(dist.irecv, received, left, group.process_group)
                for work in dist.batch_isend_irecv([send, receive]):
                    work.wait()
                rows = received
    return output
