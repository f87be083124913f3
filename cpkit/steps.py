"""The steps that gathers are made of: each is one pass over the data.

Rows travel as bytes: `[rows, lanes]`, where a lane is the widest integer that fits the row. So fp8
and bool move like any other dtype, bit by bit.

    pad      [rows, lanes]           → [max_len, lanes] wire     [max_len, lanes]        → [cp_size
    · max_len, lanes]     rank order, padding between the ranks strip    [cp_size · max_len, …]  →
    [total, lanes]                 rank order reorder  [total, lanes]          → [total, lanes]
    token order push     [rows, lanes]           → [total, lanes] of every peer   token order at
    once
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from cpkit import push
from cpkit.group import CPGroup, plain_all_gather
from cpkit.layout import ContextParallelMetadata
from cpkit.pool import SymmetricPool
from cpkit.symm import use_symmetric_memory

_LANES = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor `[rows, …]` as `[rows, lanes]`; a view unless it is strided or misaligned."""
    row_items = math.prod(x.shape[1:])
    row_bytes = row_items * x.element_size()
    if row_bytes == 0:
        return torch.empty(x.shape[0], 0, dtype=torch.uint8)
    dense = x.detach().resolve_conj().resolve_neg().contiguous()
    # One row counts as contiguous whatever its strides are; here they must be the plain ones.
    flat = dense.as_strided((x.shape[0], row_items), (row_items, 1))
    offset_bytes = flat.storage_offset() * x.element_size()
    for width, lane in _LANES:
        if row_bytes % width == 0 and offset_bytes % width == 0:
            return flat.view(lane)
    raise AssertionError("every row is a whole number of bytes")


def from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[rows, lanes]` as a tensor with the dtype and the trailing shape of `like`; a view."""
    if rows.shape[1] == 0:
        return like.new_empty(rows.shape[0], *like.shape[1:])
    return rows.view(like.dtype).view(rows.shape[0], *like.shape[1:])


def pad_rows(rows: torch.Tensor, max_len: int, group: CPGroup, *, symmetric: bool) -> torch.Tensor:
    """This rank's rows, padded to `max_len`.

    In symmetric memory they are copied into the pool and the padding stays as it is: nobody reads
    it (SGLang #37337). In ordinary memory the padding is zeros, as in the seed.
    """
    if symmetric:
        with use_symmetric_memory(group):
            shard = torch.empty(max_len, rows.shape[1], dtype=rows.dtype)
        shard[: rows.shape[0]].copy_(rows)
        return shard
    missing = max_len - rows.shape[0]
    return F.pad(rows, [0, 0, 0, missing]) if missing else rows


def gather_shards(shard: torch.Tensor, group: CPGroup, pool: SymmetricPool | None) -> torch.Tensor:
    """Every rank's padded shard, in rank order; received in the pool when there is one."""
    with use_symmetric_memory(group, disabled=pool is None):
        gathered = torch.empty(shard.shape[0] * group.size, shard.shape[1], dtype=shard.dtype)
    if pool:
        pool.push_shard(gathered, shard)
    else:
        plain_all_gather(gathered, shard, group)
    return gathered


def strip_padding(gathered: torch.Tensor, rows_per_rank: Sequence[int]) -> torch.Tensor:
    """Drop the padding between the ranks' rows: rank order, dense."""
    chunks = gathered.chunk(len(rows_per_rank))
    return torch.cat([chunk[:rows] for chunk, rows in zip(chunks, rows_per_rank, strict=True)])


def reorder_tokens(rank_order: torch.Tensor, metadata: ContextParallelMetadata) -> torch.Tensor:
    """From rank order to token order: upstream's split and cat for zigzag, else one index."""
    if metadata.strategy == "zigzag":
        blocks = rank_order.split(metadata.reverse_split_len)
        return torch.cat([blocks[place] for place in metadata.cp_reverse_index])
    return rank_order.index_select(0, metadata.token_order)


def push_rows(
    rows: torch.Tensor,
    output: torch.Tensor,
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
) -> None:
    """Store this rank's rows at their final place in every peer's `output`.

    Ranks start at different peers, so that they do not all write to the same memory at once. The
    caller synchronizes: before (the outputs are free) and after (all rows have landed).
    """
    for copy in push_copies(rows, output, metadata, pool):
        copy()


def push_copies(
    rows: torch.Tensor,
    output: torch.Tensor,
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
) -> list[push.Copy]:
    """The copies of `push_rows`, to be made once or, by a plan, again and again."""
    rank, size = pool.group.rank, pool.group.size
    peers = [(rank + step) % size for step in range(size)]
    row_bytes = rows.shape[1] * rows.element_size()
    pieces = push.tiles(metadata, rank, row_bytes)
    if all(piece.step == 1 for piece in pieces):
        places = pool.peer_addresses(output)
        return push.dense_copies(rows.data_ptr(), [places[p] for p in peers], row_bytes, pieces)
    return push.spread_copies(rows, [pool.peer_view(output, p) for p in peers], pieces)
