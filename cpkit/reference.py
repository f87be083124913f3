"""The gather as one would write it down: slow, short, and right. Read this first.

Same signature as `cpkit.gather.all_gather_kv`. One broadcast per rank, then one assignment per row:
`whole[token] = row`, for the tokens that `rank_rows` names. No padding, no symmetric memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata


def all_gather_kv_reference(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    algorithm: str = "direct",  # noqa: ARG001 - all algorithms have this one result
    stream: torch.cuda.Stream | None = None,  # noqa: ARG001 - CPU tensors have none
) -> list[torch.Tensor]:
    """From `[rows, …]` each to `[total_tokens, …]` each, token order. Collective; no checks."""
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
