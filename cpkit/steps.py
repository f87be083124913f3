"""The steps that gathers are made of: each is one pass over the data.

Rows travel as bytes: `[rows, lanes]`, where a lane is the widest integer that fits the row. So fp8
and bool move like any other dtype, bit by bit.

    pad      [rows, lanes]       → [max_len, lanes]
    wire     [max_len, lanes]    → [cp_size · max_len, lanes]       rank order, with padding
    strip    [cp_size · max_len] → [total, lanes]                   rank order
    reorder  [total, lanes]      → [total, lanes]                   token order
    push     [rows, lanes]       → [total, lanes] of every peer     token order at once
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from cpkit.devices import is_capturing
from cpkit.group import CPGroup
from cpkit.kernels import push
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.collective import plain_all_gather
from cpkit.memory.pool import SymmetricPool
from cpkit.stages import stage
from cpkit.symm import use_symmetric_memory

_captured: list[torch.Tensor] = []  # what replays of graphs read, whatever the cache forgets
_LANES = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor `[rows, …]` as `[rows, lanes]`; a view unless it is strided or misaligned."""
    row_items = math.prod(x.shape[1:])
    row_bytes = row_items * x.element_size()
    if row_bytes == 0:
        return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
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
            shard = rows.new_empty(max_len, rows.shape[1])
        shard[: rows.shape[0]].copy_(rows)
        return shard
    missing = max_len - rows.shape[0]
    return F.pad(rows, [0, 0, 0, missing]) if missing else rows


def gather_all(
    shards: Sequence[torch.Tensor],
    group: CPGroup,
    pool: SymmetricPool | None,
    *,
    symmetric_send: bool,
    symmetric_recv: bool,
) -> list[torch.Tensor]:
    """Every rank's padded shards, in rank order: `[cp_size · max_len, lanes]` for each tensor.

    `symmetric_recv` receives in symmetric memory, if there is a pool: ranks push, or NCCL moves the
    shards. Otherwise the ordinary collective of torch.distributed does it, which on a shared GPU
    is staged. `symmetric_send` says that `pad_rows` put the shards into the pool on all ranks.
    """
    if pool and symmetric_recv:
        return _gather_in_pool(shards, pool, symmetric_send=symmetric_send)
    if pool and pool.backend.transport() == "cuda":
        return _gather_staged(shards, pool)
    with stage("wire"):
        gathered = [x.new_empty(x.shape[0] * group.size, x.shape[1]) for x in shards]
        for output, shard in zip(gathered, shards, strict=True):
            plain_all_gather(output, shard, group)
    return gathered


def _gather_in_pool(
    shards: Sequence[torch.Tensor], pool: SymmetricPool, *, symmetric_send: bool
) -> list[torch.Tensor]:
    with stage("wire"):
        with use_symmetric_memory(pool.group):
            gathered = [x.new_empty(x.shape[0] * pool.group.size, x.shape[1]) for x in shards]
        by_nccl = pool.backend.transport().startswith("nccl")
        if not by_nccl:
            pool.backend.enter()
        for output, shard in zip(gathered, shards, strict=True):
            if by_nccl:
                _gather_by_nccl(output, shard, pool, symmetric_send=symmetric_send)
            else:
                pool.push_shard(output, shard)
    with stage("exit"):
        if not by_nccl:  # which is done when its kernel is
            pool.backend.leave()
    return gathered


def _gather_by_nccl(
    output: torch.Tensor, shard: torch.Tensor, pool: SymmetricPool, *, symmetric_send: bool
) -> None:
    """Into an output that the pool placed at one offset on all ranks.

    A shard that needed no padding is the caller's own tensor, which may lie in symmetric memory on
    some ranks only: without `symmetric_send` NCCL gets an ordinary copy of such a one.
    """
    windows = not pool.backend.window_problem()
    plain_all_gather(
        output,
        shard,
        pool.group,
        symmetric_send=windows and symmetric_send,
        symmetric_recv=windows,
    )


def _gather_staged(shards: Sequence[torch.Tensor], pool: SymmetricPool) -> list[torch.Tensor]:
    """Into ordinary memory, for ranks that share a GPU: each pulls out of the peers' stages.

    rank 0   shard → stage 0 │ barrier │ pull stage 0, stage 1 │ barrier │ stage 0 is free again
    rank 1   shard → stage 1 │ barrier │ pull stage 1, stage 0 │ barrier │

    Only this rank writes to its stage, so there is nobody to wait for before that.
    """
    with stage("wire"):
        with use_symmetric_memory(pool.group):
            stages = [torch.empty_like(shard) for shard in shards]
        for staged, shard in zip(stages, shards, strict=True):
            staged.copy_(shard)
        pool.backend.leave()
        gathered = [x.new_empty(x.shape[0] * pool.group.size, x.shape[1]) for x in shards]
        for output, staged in zip(gathered, stages, strict=True):
            pool.pull_shards(output, staged)
    with stage("exit"):
        pool.backend.leave()
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
    order = token_order_on(metadata, rank_order.device)
    if is_capturing(order.device.type):
        _captured.append(order)
    return rank_order.index_select(0, order)


@lru_cache(maxsize=256)
def token_order_on(metadata: ContextParallelMetadata, device: torch.device) -> torch.Tensor:
    """`metadata.token_order`, kept on the device: a captured graph can't copy it there.

    Made outside inference mode, whatever the first caller's mode is: autograd may save it later.
    """
    with torch.inference_mode(False):
        return metadata.token_order.to(device)


def scatter_into(
    caches: Sequence[torch.Tensor], gathered: Sequence[torch.Tensor], slots: torch.Tensor
) -> None:
    """Store token t at row `slots[t]` of each cache, `[slots, lanes]`; nowhere when that is -1."""
    wanted = (slots >= 0).nonzero().flatten()
    for cache, rows in zip(caches, gathered, strict=True):
        target, source = same_lanes(cache, rows)
        target.index_copy_(0, slots[wanted], source[wanted])


def same_lanes(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two `[rows, lanes]` of equal rows, both in the narrower lane: their alignments may differ."""
    lane = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.view(lane), b.view(lane)


def push_all(
    rows: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    slots: torch.Tensor | None = None,
) -> None:
    """Store this rank's rows, `[rows, lanes]` each, into every peer's outputs. CPU.

    Outputs, `[total_tokens, lanes]` each, are in the pool, at one offset on all ranks. With `slots`
    (int64 `[total_tokens]`) token t goes to row `slots[t]`, and nowhere when that is -1.
    """
    with stage("wire"):
        pool.backend.enter()
        for x, output in zip(rows, outputs, strict=True):
            if not output.numel():
                continue
            if slots is None:
                push_rows(x, output, metadata, pool)
            else:
                push_into_slots(x, output, metadata, pool, slots)
    with stage("exit"):
        pool.backend.leave()


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
    if (pieces.step == 1).all():
        places = pool.peer_addresses(output)
        return push.dense_copies(rows.data_ptr(), [places[p] for p in peers], row_bytes, pieces)
    return push.spread_copies(rows, [pool.peer_view(output, p) for p in peers], pieces)


def push_into_slots(
    rows: torch.Tensor,
    cache: torch.Tensor,
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    slots: torch.Tensor,
) -> None:
    """Store this rank's rows into their slots of every peer's `cache`, `[slots, lanes]`.

    rank 1 holds tokens 2 3, slots [7, -1, 0, 5]: its rows go to rows 0 and 5 of every cache
    """
    rank, size = pool.group.rank, pool.group.size
    mine = slots[metadata.rank_rows(rank).to(slots.device)]
    wanted = (mine >= 0).nonzero().flatten()
    places, chosen = mine[wanted], rows if len(wanted) == len(rows) else rows[wanted]
    for peer in ((rank + step) % size for step in range(size)):
        target, source = same_lanes(pool.peer_view(cache, peer), chosen)
        target.index_copy_(0, places, source)


def push_all_reference(
    rows: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    slots: torch.Tensor | None = None,
) -> None:
    """`push_all`, and on CUDA `cuda_push.push_all`, written down: one indexed store per peer."""
    mine = metadata.rank_rows(pool.group.rank)
    pool.backend.enter()
    for x, output in zip(rows, outputs, strict=True):
        tokens = mine.to(x.device)
        places = tokens if slots is None else slots[tokens]
        wanted = places >= 0
        for peer in range(pool.group.size):
            target, source = same_lanes(pool.peer_view(output, peer), x)
            target[places[wanted]] = source[wanted]
    pool.backend.leave()
