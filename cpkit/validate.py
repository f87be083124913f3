"""Check the arguments of a gather. Every check raises ValueError on the rank with the fault.

A message says what was passed, what is allowed and what to call instead. The checks run inside an
agreement (cpkit.sync.agreement), which turns one rank's error into an error on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch.autograd import forward_ad

from cpkit.algorithms import TABLE
from cpkit.devices import (
    check_no_grad,
    check_readable,
    check_tensor,
    is_capturing,
)
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.pool import SymmetricPool
from cpkit.memory.sizing import Demand, gather_demand
from cpkit.sync.agreement import Signature
from cpkit.sync.collective import describe
from cpkit.sync.free_memory import explain_refusal_of, shortage

LARGE_BYTES = 64 << 20  # a gather on the CPU that needs more, all ranks together, checks its room
_MAX_CHECKED_CALLS = 256


class GatherSignature(Signature):
    """What must be equal in an all_gather_kv, and the memory that it needs.

    `demand` is that of one rank. `nbytes` includes copies of strided tensors, all ranks together;
    it is 0 on CUDA.
    """

    def __init__(self, text: str, demand: Demand, nbytes: int) -> None:
        super().__init__(text)
        self.demand, self.nbytes = demand, nbytes


def check_group(group: CPGroup) -> None:
    """Check that this is a group. Local, because an agreement needs a group."""
    if not isinstance(group, CPGroup):
        raise ValueError(f"group is {group!r}; pass what init_context_parallel(cp_size) returned")


def check_call(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    symmetric: bool,
) -> GatherSignature:
    """Check the arguments of all_gather_kv; return what must be equal on all ranks.

    A model makes the same call in every layer, so a call with the same metadata, shapes, dtypes and
    devices as an earlier one is not checked again. Only calls with ordinary tensors are cached.
    """
    key = call_key(tensors, metadata, algorithm, symmetric)
    known = group.checked_calls.get(key) if key else None
    if known:
        return known  # type: ignore[no-any-return]
    _check_call(tensors, metadata, group, algorithm)
    rows = ", ".join(f"{list(x.shape[1:])} {x.dtype} {x.device.type}" for x in tensors)
    layout = _describe_layout(metadata)
    row_bytes = sum(math.prod(x.shape[1:]) * x.element_size() for x in tensors)
    max_len = metadata.max_rank_len[0]
    demand = gather_demand(metadata, max_len, row_bytes, algorithm if symmetric else "padded")
    signature = GatherSignature(
        f"all_gather_kv({layout}, {algorithm=!s}, {symmetric=}, rows of {rows})",
        demand,
        0 if tensors[0].is_cuda else group.size * (sum(demand) + max_len * row_bytes),
    )
    if key:
        if len(group.checked_calls) >= _MAX_CHECKED_CALLS:
            group.checked_calls.clear()
        group.checked_calls[key] = signature
    return signature


def check_memory(
    demand: Demand,
    tensors: Sequence[torch.Tensor],
    group: CPGroup,
    into: Sequence[torch.Tensor] | None = None,
) -> None:
    """Check that a large gather on the CPU fits into memory, with those of its peers. Local.

    Strided tensors are copied first. Memory that the pool already has is not counted.
    """
    if into is not None and not demand.ordinary:
        demand = Demand(0, 0)  # `direct` stores into the caches
    pool = group.pools.get("cpu")
    in_pool = 0
    if isinstance(pool, SymmetricPool):
        stats = pool.stats()
        in_pool = stats.arena_bytes + stats.spill_bytes
    copies = sum(x.nbytes for x in tensors if not x.is_contiguous())
    ordinary = demand.ordinary + copies
    problem = shortage(group.ranks_by_limit, max(0, demand.shared - in_pool), ordinary)
    problem = problem or explain_refusal_of(ordinary)
    if problem:
        raise ValueError(f"this gather does not fit into memory: {problem}")


def call_key(
    tensors: Any, metadata: object, algorithm: object, symmetric: bool
) -> tuple[object, ...] | None:
    """Return all that the checks and the signature depend on; None if the call is not cached."""
    if type(tensors) not in (list, tuple) or type(metadata) is not ContextParallelMetadata:
        return None
    if not tensors or type(algorithm) is not str or forward_ad._current_level >= 0:
        return None
    key: list[object] = [metadata, algorithm, symmetric]
    for x in tensors:
        try:
            is_ordinary = (
                type(x) is torch.Tensor
                and x.layout is torch.strided
                and not x.is_nested
                and (x.data_ptr() or not x.numel())
                and not (x.requires_grad and torch.is_grad_enabled())
            )
        except RuntimeError:  # inside torch.func transforms, tensors have no address
            is_ordinary = False
        if not is_ordinary:
            return None
        key += (x.shape, x.dtype, x.device)
        if x.is_cuda:
            key.append(torch._C._cuda_getDevice())
    return tuple(key)


def _check_call(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
) -> None:
    if not isinstance(algorithm, str) or algorithm not in TABLE:
        raise ValueError(f"algorithm is {algorithm!r}; it must be one of {', '.join(TABLE)}")
    _check_metadata(metadata)
    if metadata.cp_size != group.size:
        raise ValueError(
            f"the metadata is for cp_size {metadata.cp_size} and the group has {group.size} ranks; "
            f"use init_context_parallel({metadata.cp_size}) if the job has as many ranks, or "
            f"prepare_context_parallel_metadata(lengths, {group.size})"
        )
    if not isinstance(tensors, list | tuple) or not tensors:
        got = "an empty list" if isinstance(tensors, list | tuple) else type(tensors).__name__
        raise ValueError(
            f"tensors is {got}; it must be a list of at least one tensor, for example [k, v]"
        )
    for number, x in enumerate(tensors):
        check_readable(f"tensors[{number}]", x)
    devices = {str(x.device) for x in tensors if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(
            f"tensors are on {', '.join(sorted(devices))}; pass tensors of one device per call"
        )
    for number, x in enumerate(tensors):
        _check_rows(x, metadata, group, f"tensors[{number}]")


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, ContextParallelMetadata):
        raise ValueError(
            f"the metadata is {metadata!r}; pass what prepare_context_parallel_metadata(lengths, "
            "cp_size) returned"
        )


def _check_rows(
    x: torch.Tensor, metadata: ContextParallelMetadata, group: CPGroup, name: str
) -> None:
    rows = metadata.per_rank_actual_token[group.rank]
    check_tensor(name, x)
    check_no_grad(name, x)
    if x.ndim < 1 or x.shape[0] != rows:
        raise ValueError(
            f"{name} is {describe(x)}, and rank {group.rank} holds {rows} rows of this batch "
            f"(per_rank_actual_token); use layout.shard(x, metadata, {group.rank})"
        )


@lru_cache(maxsize=256)
def _describe_layout(metadata: ContextParallelMetadata) -> str:
    """Describe a layout briefly; a digest keeps the texts of different layouts different."""
    lengths = list(metadata.lengths)
    shown = str(lengths) if len(lengths) <= 16 else f"[{lengths[0]}, … {len(lengths)} sequences]"
    digest = blake2b(repr(lengths).encode(), digest_size=8).hexdigest()
    return f"{metadata.strategy}, cp_size={metadata.cp_size}, lengths={shown} ({digest})"


# ---------------------------------------------------------------------- SGLang's functions


def check_sglang_call(
    x: torch.Tensor,
    total_len: int,
    cp_size: int,
    metadata: ContextParallelMetadata,
    group: CPGroup,
    symmetric: bool,
) -> Signature:
    """Check the arguments of SGLang's functions; return what must be equal on all ranks."""
    _check_metadata(metadata)
    if not isinstance(total_len, int) or isinstance(total_len, bool):
        raise ValueError(f"total_len is {total_len!r}; it must be a whole number of tokens")
    if type(cp_size) is not int:
        raise ValueError(f"cp_size is {cp_size!r}; it must be a whole number of ranks")
    if cp_size != group.size or cp_size != metadata.cp_size:
        raise ValueError(
            f"cp_size is {cp_size}; the metadata is for {metadata.cp_size} and the current group "
            f"has {group.size} ranks. All three must be equal: call init_context_parallel first"
        )
    max_len, needed = -(-total_len // cp_size), metadata.max_rank_len[0]
    if max_len < needed:
        raise ValueError(
            f"total_len={total_len} over {cp_size} ranks pads to {max_len} rows, but a rank holds "
            f"{needed} (rows by rank: {list(metadata.per_rank_actual_token)}): rows would be cut "
            f"off. ceil(total_len / cp_size) fits one sequence only; pass "
            f"total_len={needed * cp_size} (max_rank_len · cp_size), or call all_gather_kv"
        )
    _check_rows(x, metadata, group, "input_tensor")
    row = x.shape[1:]
    row_bytes = math.prod(row) * x.element_size()
    if 4 * cp_size * max_len * cp_size * row_bytes > LARGE_BYTES and not x.is_cuda:
        algorithm = "padded_symm_recv" if symmetric else "padded"
        check_memory(gather_demand(metadata, max_len, row_bytes, algorithm), [x], group)
    return Signature(
        f"cp_all_gather_reorganized_into_tensor_kv_cache(rows of {list(row)} {x.dtype} "
        f"{x.device.type}; {total_len=}, {_describe_layout(metadata)})"
    )


# -------------------------------------------------------------------------- CUDA graphs


def check_capture(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    symmetric: bool,
    into: Sequence[torch.Tensor] | None,
) -> None:
    """Check that this gather can be captured, if a CUDA graph is being captured."""
    if not is_capturing("cuda"):
        return
    if algorithm == "direct" and symmetric:
        pool = group.pools.get("cuda")
        if not isinstance(pool, SymmetricPool) or not pool.backend.can_capture(
            tensors, metadata, into
        ):
            raise ValueError(
                "this gather is captured in a CUDA graph before it has run: run it once (same "
                "lengths, same tensors) before torch.cuda.graph, which makes pool, kernel and "
                "tables"
            )
    elif into is not None:
        raise ValueError(
            "only 'direct' in symmetric memory can be captured with caches: other algorithms read "
            "the slots on the host"
        )
