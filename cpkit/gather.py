"""The padded context-parallel KV-cache all-gather, and better ones: four algorithms, one result.

    W = cp_size                  T   = total_tokens, of the batch
    P = max_rank_len[0]          n_r = per_rank_actual_token[r], the rows that rank r holds

    padded            pad to [P] → all-gather into ordinary memory [W·P] → strip → reorder
    padded_symm_recv  pad to [P] → all-gather into symmetric memory [W·P] → strip → reorder
    padded_symm       pad into a symmetric shard [P], then as padded_symm_recv
    direct            each rank stores its n_r rows at their final place in every peer's [T]

Every call begins with one agreement, in which the ranks check that all of them make the same call.
Invalid arguments raise ValueError on every rank before any data moves. CUDA tensors are then
gathered in stream order, and the host does not wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from cpkit.algorithms import ALGORITHMS, TABLE, Algorithm
from cpkit.caches import cache_as_rows, check_caches, scatter_into
from cpkit.devices import check_stream, keep_for_replays, on_stream
from cpkit.eager import eager_only
from cpkit.group import CPGroup, get_attention_cp_group, is_allocation_symmetric
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import as_dense, as_rows, from_rows
from cpkit.memory.ordinary import ASYMMETRIC_BATCH, OrdinaryMemory, spanning_machines
from cpkit.memory.path import PathReport
from cpkit.memory.pool import SymmetricPool
from cpkit.repeat import find_repeated, keep_to_repeat
from cpkit.stages import keep, stage
from cpkit.symm import use_symmetric_memory
from cpkit.validate import (
    LARGE_BYTES,
    check_call,
    check_capture,
    check_group,
    check_memory,
    check_sglang_call,
)

__all__ = [
    "ALGORITHMS",
    "all_gather_kv",
    "cp_all_gather_reorganized_into_tensor_kv_cache",
    "cp_all_gather_rerange_kv_cache",
    "last_path",
    "path_of_result",
]

Memory = SymmetricPool | OrdinaryMemory
Tensors = Sequence[torch.Tensor]
Gathered = tuple[list[torch.Tensor], PathReport]
Gather = Callable[[Tensors, ContextParallelMetadata, Memory], Gathered]


@eager_only
def all_gather_kv(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    algorithm: str = "direct",
    stream: torch.cuda.Stream | None = None,
    into: Sequence[torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Gather K, V and other tensors: `[rows, …]` each to `[total_tokens, …]` each, in token order.

    Collective over the group. `tensors` are this rank's rows (`layout.shard`), of any dtype,
    trailing shape and stride, all on the CPU or all on this rank's GPU. `direct` returns tensors in
    the group's symmetric pool; their memory is reused only after every rank has dropped them. The
    other algorithms return ordinary tensors. Where symmetric memory is not possible (the group
    spans machines, or `is_allocation_symmetric()` is false), every algorithm runs as `padded`, and
    `last_path` reports that.

    On CUDA the gather runs on `stream` (default: the current one) after all earlier work of the
    current stream; make the stream that reads the results wait for it. The host does not wait, so a
    late rank is detected afterwards: the next call, or `group.check()` after a synchronization,
    raises TimeoutError.

    With `into` and `slots`, rows are stored in paged KV caches. `into` holds one cache `[slots, …]`
    per tensor. Its rows must be dense but may lie apart, as in a column slice of a wider cache.
    `slots`, int64 or int32 `[total_tokens]`, is the cache row of each token, or -1 to skip it.
    `direct` stores straight into every rank's cache, which must be in the pool; the others gather,
    then scatter. Returns `into`. Slots are checked on the host, so on CUDA the call waits for its
    stream; during capture they are not checked. Source: SGLang's `cp_allgather_and_save_kv_cache`.

    Raises ValueError on every rank, before any data moves, when any rank passes an unknown
    algorithm or wrong rows or caches, when shapes, dtypes, lengths or slots differ among ranks, or
    when a gather on the CPU that needs more than 64 MiB does not fit into memory. If a rank fails
    later on the CPU while its peers wait at a barrier, they raise RankFailed with its error.

        rank 0 of 2, lengths [8], zigzag:  k[0 1 6 7]  →  k[0 1 2 3 4 5 6 7]
    """
    check_group(group)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    arguments = tensors, metadata, group, algorithm, symmetric, stream, into, slots
    if not (symmetric and stream is None and into is None and slots is None):
        return _check_and_gather(*arguments)
    repeated = find_repeated(tensors, metadata, group, algorithm)
    if repeated and repeated.gather is _GATHERS[algorithm]:
        return remember_path(group, *repeated(group, tensors))
    results, gather = _check_and_gather(*arguments), _GATHERS[algorithm]
    keep_to_repeat(tensors, metadata, group, algorithm, gather, gather is direct, gather is padded)
    return results


def _check_and_gather(
    tensors: Tensors,
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    symmetric: bool,
    stream: torch.cuda.Stream | None,
    into: Tensors | None,
    slots: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Take every step of all_gather_kv."""
    with stage("agree"), group.agreement(tensors) as call:
        signature = check_call(tensors, metadata, group, algorithm, symmetric)
        call.must_match(signature)
        is_large = signature.nbytes > LARGE_BYTES
        if is_large:
            check_memory(signature.demand, tensors, group, into)
        check_stream(stream)
        if into is not None or slots is not None:
            for each in check_caches(tensors, metadata, group, algorithm, symmetric, into, slots):
                call.must_match(each)
        if tensors[0].is_cuda:
            check_capture(tensors, metadata, group, algorithm, symmetric, into)

    gather = _GATHERS[algorithm] if symmetric or TABLE[algorithm].any_memory else padded
    if is_large and gather is padded:
        gather = padded_large
    try:
        with on_stream(stream, *tensors, *(into or ()), *(() if slots is None else (slots,))):
            memory = memory_of(group, tensors[0].device, symmetric)
            if into is not None and slots is not None:
                path = _gather_into(gather, tensors, metadata, memory, into, slots)
                return remember_path(group, list(into), path)
            results, path = gather(tensors, metadata, memory)
    except Exception as error:
        if gather is not padded and not tensors[0].is_cuda:
            group.report_failure(error)
        raise
    return remember_path(group, results, path)


def memory_of(group: CPGroup, device: torch.device, symmetric: bool) -> Memory:
    """Return the group's pool on this device, or ordinary memory if not `symmetric`.

    The first call makes the pool and is collective over the group.
    """
    if not symmetric:
        reason = spanning_machines(group) if group.spans_hosts else ASYMMETRIC_BATCH
        return OrdinaryMemory(group, device, reason)
    pool = group.pools.get(device.type)
    return pool if isinstance(pool, SymmetricPool) else SymmetricPool(group, device=device.type)


# --------------------------------------------------------------------- the algorithms


def padded(tensors: Tensors, metadata: ContextParallelMetadata, memory: Memory) -> Gathered:
    """Pad, gather with the ordinary collective, strip, reorder. Source: SGLang before #24040."""
    shards, outputs = _pad_and_allocate(tensors, metadata)
    path = memory.all_gather(shards, outputs)
    return _strip_and_reorder(outputs, metadata, tensors), path


def padded_large(tensors: Tensors, metadata: ContextParallelMetadata, memory: Memory) -> Gathered:
    """Gather as `padded` does, after all ranks have agreed that they have their buffers.

    The peers of a rank without memory would wait in the collective until it times out.
    """
    with memory.group.agreement(tensors):
        shards, outputs = _pad_and_allocate(tensors, metadata)
    memory.group.barrier()  # later failures are not reported: the peers wait in the collective
    path = memory.all_gather(shards, outputs)
    return _strip_and_reorder(outputs, metadata, tensors), path


def padded_symm_recv(
    tensors: Tensors, metadata: ContextParallelMetadata, memory: Memory
) -> Gathered:
    """Gather as `padded` does, into a symmetric receive buffer. Source: SGLang #24040."""
    shards = _pad(tensors, metadata)
    outputs = [memory.empty((len(x) * metadata.cp_size, x.shape[1]), x.dtype) for x in shards]
    path = memory.all_gather(shards, outputs, symmetric_recv=True)
    return _strip_and_reorder(outputs, metadata, tensors), path


def padded_symm(tensors: Tensors, metadata: ContextParallelMetadata, memory: Memory) -> Gathered:
    """Gather as `padded_symm_recv` does, from a shard padded in the pool. Source: SGLang #37337."""
    rows = [as_rows(x) for x in tensors]
    keep("shard", rows[0])
    with stage("pad"):
        shards = [memory.empty((metadata.max_rank_len[0], x.shape[1]), x.dtype) for x in rows]
        for shard, x in zip(shards, rows, strict=True):
            shard[: len(x)].copy_(x)  # the padding stays uninitialized: no rank reads it
    keep("pad", shards[0])
    outputs = [memory.empty((len(x) * metadata.cp_size, x.shape[1]), x.dtype) for x in shards]
    path = memory.all_gather(shards, outputs, symmetric_send=True, symmetric_recv=True)
    return _strip_and_reorder(outputs, metadata, tensors), path


def direct(tensors: Tensors, metadata: ContextParallelMetadata, memory: Memory) -> Gathered:
    """Store each row at its final place in every peer's output: one pass, over the wire.

    rank 0   agreement │ store into 0, into 1 │ barrier │ read
    rank 1   agreement │ store into 1, into 0 │ barrier │ read
                       ↑ outputs are free       ↑ all rows have arrived
    """
    assert isinstance(memory, SymmetricPool)
    rows = [as_dense(x) for x in tensors]
    keep("shard", rows[0])
    tokens = metadata.total_tokens
    with stage("allocate"):
        outputs = [memory.empty((tokens, *x.shape[1:]), x.dtype) for x in tensors]
    path = memory.push(rows, outputs, metadata)
    keep("wire", outputs[0])
    return outputs, path


_GATHERS: dict[str, Gather] = {
    "padded": padded,
    "padded_symm_recv": padded_symm_recv,
    "padded_symm": padded_symm,
    "direct": direct,
}


def add_gather(name: str, gather: Gather) -> None:
    """Accept `name` as an algorithm in this process: a new one, or one to replace. Local."""
    buffers = {"symmetric_send": True, "symmetric_recv": True}  # at most; nothing is known
    TABLE[name] = Algorithm(name, TABLE["padded"].passes, **buffers, any_memory=True)
    _GATHERS[name] = gather


def _pad(tensors: Tensors, metadata: ContextParallelMetadata) -> list[torch.Tensor]:
    """Return this rank's rows padded with zeros, `[P, lanes]` each."""
    rows = [as_rows(x) for x in tensors]
    keep("shard", rows[0])
    with stage("pad"):
        shards = [pad_rows(x, metadata.max_rank_len[0]) for x in rows]
    keep("pad", shards[0])
    return shards


def _pad_and_allocate(
    tensors: Tensors, metadata: ContextParallelMetadata
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the padded shards `[P, lanes]` and receive buffers `[W·P, lanes]`, both ordinary."""
    shards = _pad(tensors, metadata)
    return shards, [x.new_empty(len(x) * metadata.cp_size, x.shape[1]) for x in shards]


def _strip_and_reorder(
    outputs: list[torch.Tensor], metadata: ContextParallelMetadata, tensors: Tensors
) -> list[torch.Tensor]:
    """Convert `[W·P, lanes]` each, padded rank order, to results `[T, …]` each, token order."""
    keep("wire", outputs[0])
    with stage("strip"):
        rank_order = [strip_padding(x, metadata.per_rank_actual_token) for x in outputs]
    keep("strip", rank_order[0])
    with stage("reorder"):
        token_order = [reorder_tokens(x, metadata) for x in rank_order]
    keep("reorder", token_order[0])
    return [from_rows(x, like) for x, like in zip(token_order, tensors, strict=True)]


def _gather_into(
    gather: Gather,
    tensors: Tensors,
    metadata: ContextParallelMetadata,
    memory: Memory,
    into: Sequence[torch.Tensor],
    slots: torch.Tensor,
) -> PathReport:
    """Store each token at its slot of every cache; all but `direct` need a last pass for that."""
    caches = [cache_as_rows(cache) for cache in into]
    slots = slots.long().contiguous()
    if gather is direct and isinstance(memory, SymmetricPool):
        rows = [as_dense(x) for x in tensors]
        keep("shard", rows[0])
        path = memory.push(rows, caches, metadata, slots)
        keep("wire", caches[0])
        return path
    gathered, path = gather(tensors, metadata, memory)
    with stage("scatter"):
        scatter_into(caches, [as_rows(x) for x in gathered], slots)
    return path


# -------------------------------------------------------------------- SGLang's functions


@eager_only
def cp_all_gather_reorganized_into_tensor_kv_cache(
    input_tensor: torch.Tensor,
    total_len: int,
    cp_size: int,
    forward_batch: Any,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Gather `[rows, …]` to `[total_tokens, …]` in rank order, padding stripped.

    Only `forward_batch.attn_cp_metadata` is read. The padded length is ceil(total_len / cp_size) as
    in SGLang up to 0.5.12: right for one sequence, too small for several. Raises ValueError on
    every rank when it would cut rows off, and for wrong rows or a wrong cp_size. Source: SGLang
    `cp_utils.py` up to 0.5.18 (#22914, #24040); from 0.5.13 on it takes the maximum over ranks.
    """
    group = get_attention_cp_group()
    metadata: Any = getattr(forward_batch, "attn_cp_metadata", None)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    with stage("agree"), group.agreement([input_tensor]) as call:
        call.must_match(
            check_sglang_call(input_tensor, total_len, cp_size, metadata, group, symmetric)
        )
        check_stream(stream)

    max_len = -(-total_len // cp_size)
    try:
        with on_stream(stream, input_tensor):
            rows = as_rows(input_tensor)
            keep("shard", rows)
            with stage("pad"):
                shard = pad_rows(rows, max_len)
            keep("pad", shard)
            with use_symmetric_memory(group, disabled=not symmetric):
                gathered = shard.new_empty(max_len * cp_size, shard.shape[1])
            group.cp_all_gather_into_tensor_async(gathered, shard, agreed=True)
            keep("wire", gathered)
            with stage("strip"):
                rank_order = strip_padding(gathered, metadata.per_rank_actual_token)
            keep("strip", rank_order)
    except Exception as error:
        if symmetric and not input_tensor.is_cuda:
            group.report_failure(error)
        raise
    assert group.last_path is not None
    return remember_path(group, [from_rows(rank_order, input_tensor)], group.last_path)[0]


@eager_only
def cp_all_gather_rerange_kv_cache(
    input_tensor: torch.Tensor,
    total_len: int,
    cp_size: int,
    forward_batch: Any,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Gather `[rows, …]` to `[total_tokens, …]` in token order.

    Arguments and errors are those of `cp_all_gather_reorganized_into_tensor_kv_cache`.
    """
    rank_order = cp_all_gather_reorganized_into_tensor_kv_cache(
        input_tensor, total_len, cp_size, forward_batch, stream
    )
    with stage("reorder"), on_stream(stream, rank_order):
        rows = reorder_tokens(as_rows(rank_order), forward_batch.attn_cp_metadata)
    keep("reorder", rows)
    group = get_attention_cp_group()
    assert group.last_path is not None
    return remember_path(group, [from_rows(rows, input_tensor)], group.last_path)[0]


# ----------------------------------------------------------------------- the passes
#
# Rows are moved as `[rows, lanes]` (see cpkit.memory.backend).
#
#     pad      [n_r, lanes]  → [P, lanes]
#     wire     [P, lanes]    → [W·P, lanes]    rank order, with padding
#     strip    [W·P, lanes]  → [T, lanes]      rank order
#     reorder  [T, lanes]    → [T, lanes]      token order


def pad_rows(rows: torch.Tensor, max_len: int) -> torch.Tensor:
    """Append zeros up to `max_len` rows; return a tensor of that length unchanged."""
    missing = max_len - rows.shape[0]
    return F.pad(rows, [0, 0, 0, missing]) if missing else rows


def strip_padding(gathered: torch.Tensor, rows_per_rank: Sequence[int]) -> torch.Tensor:
    """Remove the padding after each rank's rows; the rows stay in rank order."""
    max_len = gathered.shape[0] // len(rows_per_rank)
    rows_and_padding = [size for rows in rows_per_rank for size in (rows, max_len - rows)]
    return torch.cat(gathered.split_with_sizes(rows_and_padding)[::2])


def reorder_tokens(rank_order: torch.Tensor, metadata: ContextParallelMetadata) -> torch.Tensor:
    """Reorder rows from rank order to token order: zigzag by blocks as in SGLang, others by row."""
    if metadata.strategy == "zigzag":
        blocks = rank_order.split_with_sizes(metadata.reverse_split_len)
        return torch.cat([blocks[position] for position in metadata.cp_reverse_index])
    order = _token_order_on(metadata, rank_order.device)
    keep_for_replays(order.device.type, order)
    return rank_order.index_select(0, order)


@lru_cache(maxsize=16)  # 8 bytes per token each
def _token_order_on(metadata: ContextParallelMetadata, device: torch.device) -> torch.Tensor:
    """Return `metadata.token_order` on the device; cached, because capture forbids the copy.

    The tensor is made outside inference mode, because autograd may save it in a later call.
    """
    with torch.inference_mode(False):
        return metadata.token_order.to(device)


# -------------------------------------------------------------------- what a gather did

_reports: dict[int, tuple[weakref.ref[torch.Tensor], PathReport]] = {}  # by id of the tensor


@eager_only
def last_path(group: CPGroup) -> PathReport | None:
    """Return the path of the group's latest gather on this rank; None before the first."""
    return group.last_path


@eager_only
def path_of_result(result: torch.Tensor) -> PathReport | None:
    """Return the path of the gather that returned this tensor object; None for any other tensor."""
    found = _reports.get(id(result))
    return found[1] if found and found[0]() is result else None


def remember_path(
    group: CPGroup, results: list[torch.Tensor], path: PathReport
) -> list[torch.Tensor]:
    """Record the path of the group's latest gather and of its results; return the results."""
    group.last_path = path
    for result in results:
        _reports[id(result)] = weakref.ref(result, partial(_forget, id(result))), path
    return results


def _forget(tensor: int, reference: weakref.ref[torch.Tensor]) -> None:
    """Drop the report of a tensor that was dropped, unless another one has its id by now."""
    found = _reports.get(tensor)
    if found and found[0] is reference:
        del _reports[tensor]
