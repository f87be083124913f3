"""The padded context-parallel KV-cache all-gather, and better ones: four algorithms, one result.

    W = cp_size, T = tokens of the batch, P = padded rows of a rank, n_r = rows that rank r holds

    padded            pad to P → collective into ordinary memory → strip → reorder
    padded_symm_recv  pad to P → peers store into a symmetric [W·P] buffer → strip → reorder
    padded_symm       copy into a symmetric shard → the same → strip → reorder
    direct            each rank stores its n_r rows at their final place in every peer's [T]

Every call begins with one meeting of the ranks, where they check that all of them pass the same:
bad arguments raise ValueError on every rank before anything moves. CUDA tensors are then gathered
in stream order, without the host waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpkit import arguments, steps
from cpkit.algorithms import ALGORITHMS
from cpkit.devices import device_type, is_capturing, on_stream, stream_problem
from cpkit.group import CPGroup, get_attention_cp_group
from cpkit.into import agree_on_caches, into_problem, read_slots, values_problem
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.path import PathReport
from cpkit.memory.pool import SymmetricPool
from cpkit.paths import path_of, path_of_result, remember
from cpkit.stages import keep, stage
from cpkit.symm import check_group, is_allocation_symmetric, symmetric_pool

__all__ = [
    "ALGORITHMS",
    "all_gather_kv",
    "cp_all_gather_reorganized_into_tensor_kv_cache",
    "cp_all_gather_rerange_kv_cache",
    "last_path",
    "path_of_result",
]


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
    """Gather K, V and whatever else in one call: from `[rows, …]` each to `[total_tokens, …]`,
    token order.

    Collective over the group. `tensors` are this rank's rows (`layout.shard`), of any dtype,
    trailing shape and stride, all on the CPU or all on this rank's GPU. `direct` returns tensors in
    the group's symmetric pool: they are yours as long as you hold them, and their bytes are reused
    only after every rank has dropped them. The other algorithms return ordinary tensors. Where
    symmetric memory can't be used (the group spans machines, or `is_allocation_symmetric()` is
    false) all algorithms do what `padded` does, and `last_path` says so.

    On CUDA the gather runs on `stream` (default: the current one) after what the current stream has
    been given so far; make the stream that reads the results wait for it. The host does not wait,
    so a rank that does not come is found out later: the next call, or `group.check()` after a
    synchronization, raises TimeoutError.

    `into` and `slots` put the rows into a paged KV cache instead: one cache `[slots, …]` a tensor,
    and int64 `slots`, `[total_tokens]`, the row of each token in the caches of all ranks, -1 for a
    token that is not stored. `direct` stores straight into every rank's cache, which has to be in
    the pool for that; the others gather, then scatter. Returns `into`. Slots are checked on the
    host, so on CUDA the call waits for its stream, unless it is captured: then they are trusted.
    Source: SGLang's `cp_allgather_and_save_kv_cache`.

    Raises ValueError on every rank, before anything moves, when one of them passes an unknown
    algorithm, wrong rows or caches, or other shapes, dtypes, lengths or slots than its peers.

        rank 0 of 2, lengths [8], zigzag:  k[0 1 6 7]  →  k[0 1 2 3 4 5 6 7]
    """
    check_group(group)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    problem, call = arguments.check_call(tensors, metadata, group, algorithm, symmetric)
    problem = problem or stream_problem(stream) or into_problem(tensors, metadata, into, slots)
    known = read_slots(slots) if not problem else None
    problem = problem or values_problem(known, into)
    problem = problem or _capture_problem(tensors, metadata, group, algorithm, symmetric, into)
    call = "" if problem else call + (" into caches" if into is not None else "")
    inputs = [] if problem else [*tensors, *(into or []), *([] if slots is None else [slots])]
    with on_stream(None if problem else stream, *inputs):
        device = "cpu" if problem else device_type(tensors[0])
        pool = enter(group, call, problem, symmetric, device)
        rows = [steps.as_rows(x) for x in tensors]
        keep("shard", rows[0])
        if into is not None:
            agree_on_caches(into, known, group, pool if algorithm == "direct" else None)
        if algorithm == "direct" and pool:
            gathered = _direct(rows, metadata, pool, into, slots)
        else:
            gathered = _padded(rows, metadata, group, pool, algorithm)
            if into is not None and slots is not None:
                with stage("scatter"):
                    steps.scatter_into([steps.as_rows(x) for x in into], gathered, slots)
    path = path_of(algorithm, group, rows[0].device)
    if into is not None:
        return remember(group, path, list(into))
    results = [steps.from_rows(x, like) for x, like in zip(gathered, tensors, strict=True)]
    return remember(group, path, results)


def cp_all_gather_reorganized_into_tensor_kv_cache(
    input_tensor: torch.Tensor,
    total_len: int,
    cp_size: int,
    forward_batch: Any,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """The seed: gather `[rows, …]` to `[total_tokens, …]` in rank order, padding stripped.

    Of `forward_batch` only `attn_cp_metadata` is read. The padded length is the seed's
    ceil(total_len / cp_size): right for one sequence, too small for several. Raises ValueError on
    every rank when it would cut rows off, and for wrong rows or a wrong cp_size. Source: SGLang
    `cp_utils.py` up to 0.5.18 (#22914, #24040).
    """
    group = get_attention_cp_group()
    metadata: Any = getattr(forward_batch, "attn_cp_metadata", None)
    problem = arguments.seed_problem(input_tensor, total_len, cp_size, metadata, group)
    problem = problem or stream_problem(stream)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    call = (
        arguments.describe_seed(input_tensor, total_len, metadata, symmetric) if not problem else ""
    )
    with on_stream(None if problem else stream, *([input_tensor] if not problem else ())):
        pool = enter(group, call, problem, symmetric, device_type(input_tensor))
        rows = steps.as_rows(input_tensor)
        keep("shard", rows)
        max_len = -(-total_len // cp_size)
        rank_order = _gather_rank_order(
            [rows], metadata.per_rank_actual_token, max_len, group, pool, "padded_symm_recv"
        )
    path = path_of("padded_symm_recv", group, rows.device)
    return remember(group, path, [steps.from_rows(rank_order[0], input_tensor)])[0]


def cp_all_gather_rerange_kv_cache(
    input_tensor: torch.Tensor,
    total_len: int,
    cp_size: int,
    forward_batch: Any,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """The seed's second half as well: `[rows, …]` to `[total_tokens, …]` in token order.

    Arguments and errors as `cp_all_gather_reorganized_into_tensor_kv_cache`.
    """
    rank_order = cp_all_gather_reorganized_into_tensor_kv_cache(
        input_tensor, total_len, cp_size, forward_batch, stream
    )
    with stage("reorder"), on_stream(stream, rank_order):
        rows = steps.reorder_tokens(steps.as_rows(rank_order), forward_batch.attn_cp_metadata)
    keep("reorder", rows)
    group = get_attention_cp_group()
    assert group.last_path is not None
    return remember(group, group.last_path, [steps.from_rows(rows, input_tensor)])[0]


def last_path(group: CPGroup) -> PathReport | None:
    """Which path the group's latest gather took on this rank, and why; None before the first."""
    return group.last_path


# --------------------------------------------------------------------- the algorithms


def _direct(
    rows: list[torch.Tensor],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    into: Sequence[torch.Tensor] | None,
    slots: torch.Tensor | None,
) -> list[torch.Tensor]:
    """One pass over the wire; the meeting before it and the barrier after it make it safe.

    rank 0   meet │ store into 0, into 1 │ barrier │ read
    rank 1   meet │ store into 1, into 0 │ barrier │ read
                  ↑ outputs are free       ↑ all rows have landed
    """
    with stage("allocate"):
        if into is not None:
            outputs = [steps.as_rows(cache) for cache in into]
        else:
            outputs = [pool.empty((metadata.total_tokens, x.shape[1]), x.dtype) for x in rows]
    if pool.device.type == "cuda":
        from cpkit.kernels.cuda_push import push_all

        with stage("wire"):
            push_all(rows, outputs, metadata, pool, slots)
    else:
        steps.push_all(rows, outputs, metadata, pool, slots)
    keep("wire", outputs[0])
    return outputs


def _padded(
    rows: list[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    pool: SymmetricPool | None,
    algorithm: str,
) -> list[torch.Tensor]:
    """Rank order, then token order."""
    counts, max_len = metadata.per_rank_actual_token, metadata.max_rank_len[0]
    rank_order = _gather_rank_order(rows, counts, max_len, group, pool, algorithm)
    with stage("reorder"):
        gathered = [steps.reorder_tokens(x, metadata) for x in rank_order]
    keep("reorder", gathered[0])
    return gathered


def _gather_rank_order(
    rows: list[torch.Tensor],
    rows_per_rank: Sequence[int],
    max_len: int,
    group: CPGroup,
    pool: SymmetricPool | None,
    algorithm: str,
) -> list[torch.Tensor]:
    """Pad, wire, strip: all tensors cross the wire before the one exit barrier."""
    with stage("pad"):
        symmetric_send = algorithm == "padded_symm" and pool is not None
        shards = [steps.pad_rows(x, max_len, group, symmetric=symmetric_send) for x in rows]
    keep("pad", shards[0])
    gathered = steps.gather_all(
        shards,
        group,
        pool,
        symmetric_send=symmetric_send,
        symmetric_recv=algorithm != "padded",
    )
    keep("wire", gathered[0])
    with stage("strip"):
        stripped = [steps.strip_padding(x, rows_per_rank) for x in gathered]
    keep("strip", stripped[0])
    return stripped


# ---------------------------------------------------------- agreeing before data moves


def _capture_problem(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    symmetric: bool,
    into: Sequence[torch.Tensor] | None,
) -> str:
    """Why this gather can't be captured in a CUDA graph now; empty when it can."""
    if not is_capturing(device_type(tensors[0])):
        return ""
    if algorithm == "direct" and symmetric:
        from cpkit.kernels.cuda_push import capture_problem

        return capture_problem(tensors, metadata, group, into)
    if into is not None:
        return (
            "only 'direct' in symmetric memory can be captured into caches: the others look at the "
            "slots on the host"
        )
    return ""


def enter(
    group: CPGroup, call: str, problem: str, symmetric: bool, device: str
) -> SymmetricPool | None:
    """Meet all ranks; the group's pool afterwards, when the gather may use it."""
    with stage("agree"):
        transport = group.pools.get(device)
        (transport or group).meet(call, problem)
        return symmetric_pool(group, device) if symmetric else None
