"""A reference gather: slow, short and correct. Read this first.

`all_gather_kv_reference` takes the arguments of `cpkit.gather.all_gather_kv`: it does one broadcast
per rank, then one assignment per row, `whole[token] = row`, without padding or symmetric memory.
`push_reference` takes a pool, then the arguments of `SymmetricPool.push`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import STORED_IN_PLACE, as_rows, same_lanes
from cpkit.memory.path import PathReport
from cpkit.memory.pool import SymmetricPool


def all_gather_kv_reference(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    algorithm: str = "direct",  # noqa: ARG001 - all algorithms have the same result
    stream: torch.cuda.Stream | None = None,  # noqa: ARG001 - CPU tensors have none
) -> list[torch.Tensor]:
    """Gather `[rows, …]` each to `[total_tokens, …]` each, token order. Collective; no checks."""
    gathered = []
    for mine in tensors:
        whole = mine.new_empty(metadata.total_tokens, *mine.shape[1:])
        for rank in range(group.size):
            rows = mine.contiguous()
            if rank != group.rank:
                rows = mine.new_empty(metadata.per_rank_actual_token[rank], *mine.shape[1:])
            dist.broadcast(rows, src=group.ranks[rank], group=group.process_group)
            for row, token in zip(rows, metadata.rank_rows(rank).tolist(), strict=True):
                whole[token] = row
        gathered.append(whole)
    return gathered


def push_reference(
    pool: SymmetricPool,
    rows: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    slots: torch.Tensor | None = None,
) -> PathReport:
    """Store this rank's rows into every peer's outputs: one indexed store per peer. Collective."""
    mine = metadata.rank_rows(pool.group.rank)
    pool.backend.enter()
    for x, output in zip(rows, outputs, strict=True):
        tokens = mine.to(x.device)
        targets = tokens if slots is None else slots[tokens]
        stored = targets >= 0
        for peer in range(pool.group.size):
            view = pool.peer_view(output, peer)
            target, source = same_lanes(as_rows(view) if slots is None else view, as_rows(x))
            target[targets[stored]] = source[stored]
    pool.backend.leave()
    return STORED_IN_PLACE
