"""The padded context-parallel KV-cache all-gather, and the better ones. Four algorithms, one
result.

    W = cp_size, T = tokens of the batch, P = padded rows of a rank, n_r = rows that rank r holds

    padded            pad to P → collective into ordinary memory → strip → reorder
    padded_symm_recv  pad to P → peers store into a symmetric [W·P] buffer → strip → reorder
    padded_symm       copy into a symmetric shard → the same → strip → reorder
    direct            each rank stores its n_r rows at their final place in every peer's [T]

Every call begins with one meeting of the ranks, where they check that all of them pass the same:
bad arguments raise ValueError on every rank before anything moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpkit import arguments, steps
from cpkit.arguments import ALGORITHMS
from cpkit.group import CPGroup, get_attention_cp_group
from cpkit.layout import ContextParallelMetadata
from cpkit.path import PathReport
from cpkit.pool import SymmetricPool
from cpkit.stages import keep, stage
from cpkit.symm import check_group, is_allocation_symmetric, symmetric_pool

__all__ = [
    "ALGORITHMS",
    "all_gather_kv",
    "cp_all_gather_reorganized_into_tensor_kv_cache",
    "cp_all_gather_rerange_kv_cache",
    "last_path",
]


def all_gather_kv(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    algorithm: str = "direct",
    stream: torch.cuda.Stream | None = None,  # noqa: ARG001 - CPU tensors have none
) -> list[torch.Tensor]:
    """Gather K, V and whatever else in one call: from `[rows, …]` each to `[total_tokens, …]`,
    token order.

    Collective over the group. `tensors` are this rank's rows (`layout.shard`), of any dtype,
    trailing shape and stride. `direct` returns tensors in the group's symmetric pool: they are
    yours as long as you hold them, and their bytes are reused only after every rank has dropped
    them. The other algorithms return ordinary tensors. Where symmetric memory can't be used (the
    group spans machines, or `is_allocation_symmetric()` is false) all algorithms do what `padded`
    does, and `last_path` says so.

    Raises ValueError on every rank, before anything moves, when one of them passes an unknown
    algorithm, wrong rows, or other shapes, dtypes or lengths than its peers.

        rank 0 of 2, lengths [8], zigzag:  k[0 1 6 7]  →  k[0 1 2 3 4 5 6 7]
    """
    check_group(group)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    problem = arguments.problem(tensors, metadata, group, algorithm)
    call = arguments.describe_call(tensors, metadata, algorithm, symmetric) if not problem else ""
    pool = enter(group, call, problem, symmetric)
    rows = [steps.as_rows(x) for x in tensors]
    keep("shard", rows[0])
    if algorithm == "direct" and pool:
        gathered = _direct(rows, metadata, pool)
    else:
        rank_order = _gather_rank_order(
            rows,
            metadata.per_rank_actual_token,
            metadata.max_rank_len[0],
            group,
            pool if algorithm != "padded" else None,
            symmetric_send=algorithm == "padded_symm" and pool is not None,
        )
        with stage("reorder"):
            gathered = [steps.reorder_tokens(x, metadata) for x in rank_order]
        keep("reorder", gathered[0])
    group.last_path = path_of(algorithm, group)
    return [steps.from_rows(x, like) for x, like in zip(gathered, tensors, strict=True)]


def cp_all_gather_reorganized_into_tensor_kv_cache(
    input_tensor: torch.Tensor,
    total_len: int,
    cp_size: int,
    forward_batch: Any,
    stream: torch.cuda.Stream | None = None,  # noqa: ARG001 - CPU tensors have none
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
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    call = (
        arguments.describe_seed(input_tensor, total_len, metadata, symmetric) if not problem else ""
    )
    pool = enter(group, call, problem, symmetric)
    rows = steps.as_rows(input_tensor)
    keep("shard", rows)
    rank_order = _gather_rank_order(
        [rows],
        metadata.per_rank_actual_token,
        -(-total_len // cp_size),
        group,
        pool,
        symmetric_send=False,
    )
    group.last_path = path_of("padded_symm_recv", group)
    return steps.from_rows(rank_order[0], input_tensor)


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
    with stage("reorder"):
        rows = steps.reorder_tokens(steps.as_rows(rank_order), forward_batch.attn_cp_metadata)
    keep("reorder", rows)
    return steps.from_rows(rows, input_tensor)


def last_path(group: CPGroup) -> PathReport | None:
    """Which path the group's latest gather took on this rank, and why; None before the first."""
    return group.last_path


# --------------------------------------------------------------------- the algorithms


def _direct(
    rows: list[torch.Tensor], metadata: ContextParallelMetadata, pool: SymmetricPool
) -> list[torch.Tensor]:
    """One pass over the wire; the meeting before it and the barrier after it make it safe.

    rank 0   meet │ store into 0, into 1 │ barrier │ read
    rank 1   meet │ store into 1, into 0 │ barrier │ read
                  ↑ outputs are free       ↑ all rows have landed
    """
    with stage("allocate"):
        outputs = [pool.empty((metadata.total_tokens, x.shape[1]), x.dtype) for x in rows]
    with stage("wire"):
        for x, output in zip(rows, outputs, strict=True):
            if output.numel():
                steps.push_rows(x, output, metadata, pool)
    with stage("exit"):
        pool.group.barrier()
    keep("wire", outputs[0])
    return outputs


def _gather_rank_order(
    rows: list[torch.Tensor],
    rows_per_rank: Sequence[int],
    max_len: int,
    group: CPGroup,
    pool: SymmetricPool | None,
    *,
    symmetric_send: bool,
) -> list[torch.Tensor]:
    """Pad, wire, strip: all tensors cross the wire before the one exit barrier."""
    with stage("pad"):
        shards = [steps.pad_rows(x, max_len, group, symmetric=symmetric_send) for x in rows]
    keep("pad", shards[0])
    with stage("wire"):
        gathered = [steps.gather_shards(shard, group, pool) for shard in shards]
    if pool:
        with stage("exit"):
            group.barrier()
    keep("wire", gathered[0])
    with stage("strip"):
        stripped = [steps.strip_padding(x, rows_per_rank) for x in gathered]
    keep("strip", stripped[0])
    return stripped


# ---------------------------------------------------------- agreeing before data moves


def enter(group: CPGroup, call: str, problem: str, symmetric: bool) -> SymmetricPool | None:
    """Meet all ranks; the group's pool afterwards, when the gather may use it."""
    with stage("agree"):
        if group.transport:
            group.transport.meet(call, problem)
        else:
            group.meet(call, problem)
        return symmetric_pool(group) if symmetric else None


def path_of(algorithm: str, group: CPGroup) -> PathReport:
    """What a gather by this algorithm just did here."""
    ordinary = "ordinary memory"
    if group.spans_hosts:
        reason = f"the group spans machines (ranks {list(group.ranks)}), which cannot share memory"
    elif not is_allocation_symmetric():
        reason = "is_allocation_symmetric() is false: this batch differs between ranks"
    elif algorithm == "padded":
        reason = "algorithm 'padded' uses ordinary memory and the collective of torch.distributed"
    else:
        return PathReport("symmetric", *_SYMMETRIC_PATHS[algorithm])
    return PathReport("fallback", reason, ordinary, ordinary)


_SYMMETRIC_PATHS = {
    "padded_symm_recv": (
        "each rank stored its shard, padded in ordinary memory, into every peer's receive buffer",
        "ordinary memory",
        "in the pool",
    ),
    "padded_symm": (
        "each rank stored its padded shard into every peer's receive buffer",
        "in the pool",
        "in the pool",
    ),
    "direct": (
        "each rank stored its rows at their final place in every peer's output",
        "ordinary memory (read in place)",
        "in the pool",
    ),
}
