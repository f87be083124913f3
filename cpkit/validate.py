"""Check the arguments of a gather. Every check raises ValueError on the rank with the fault.

A message says what was passed, what is allowed and what to call instead. The checks run inside an
agreement (cpkit.sync.agreement), which turns one rank's error into an error on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch.autograd import forward_ad

from cpkit.algorithms import ALGORITHMS
from cpkit.devices import (
    check_no_grad,
    check_readable,
    check_tensor,
    is_capturing,
    is_plain_view,
)
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import row_stride
from cpkit.memory.locate import locate_start
from cpkit.memory.pool import SymmetricPool
from cpkit.memory.sizing import Demand, gather_demand
from cpkit.sync.agreement import Signature
from cpkit.sync.collective import describe, extent
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
    key = _cache_key(tensors, metadata, algorithm, symmetric)
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


def _cache_key(
    tensors: Any, metadata: object, algorithm: object, symmetric: bool
) -> tuple[object, ...] | None:
    """Return all that the checks and the signature depend on; None if the call is not cached."""
    if type(tensors) not in (list, tuple) or type(metadata) is not ContextParallelMetadata:
        return None
    if type(algorithm) is not str or forward_ad._current_level >= 0:
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
            key.append(torch.cuda.current_device())
    return tuple(key)


def _check_call(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; it must be one of {', '.join(ALGORITHMS)}")
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
            f"the metadata is {metadata!r}; pass what "
            f"prepare_context_parallel_metadata(lengths, cp_size) returned"
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


# ---------------------------------------------------------------- caches and their slots


def check_caches(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    symmetric: bool,
    into: Sequence[torch.Tensor] | None,
    slots: torch.Tensor | None,
) -> Iterator[Signature]:
    """Check paged caches and slots; yield what must be equal on all ranks.

    The values of slots are read on the host, which on CUDA waits for the stream. While a graph is
    captured they cannot be read, so they are not checked.
    """
    if into is None or slots is None:
        raise ValueError(
            "pass into and slots together: the caches, and the row of each token in them"
        )
    if not isinstance(into, list | tuple) or len(into) != len(tensors):
        count = len(into) if isinstance(into, list | tuple) else type(into).__name__
        raise ValueError(
            f"into has {count} caches for {len(tensors)} tensors; it needs one per tensor"
        )
    for number, (cache, x) in enumerate(zip(into, tensors, strict=True)):
        _check_cache(cache, x, f"into[{number}]")
    _check_overlap(into, tensors)
    _check_slots(slots, metadata, tensors[0].device)
    yield Signature("into caches")
    if algorithm == "direct" and symmetric:
        yield _cache_locations(into, group)
    if not is_capturing(slots.device.type):
        values = slots.cpu().long()
        _check_slot_values(values, min(len(cache) for cache in into))
        digest = blake2b(values.numpy().tobytes(), digest_size=16).hexdigest()
        yield Signature(
            f"slots {digest}", "slots differ between the ranks; all ranks must name the same rows"
        )


def _cache_locations(into: Sequence[torch.Tensor], group: CPGroup) -> Signature:
    locations = [locate_start(cache, group) for cache in into]
    for number, (cache, location) in enumerate(zip(into, locations, strict=True)):
        if location.other and cache.numel():
            raise ValueError(
                f"into[{number}] is {location}. 'direct' stores straight into every rank's cache, "
                f"so the caches must be in the group's pool: allocate them once inside "
                f"`with use_symmetric_memory(group)`, or use another algorithm, which gathers "
                f"first and then scatters"
            )
    strides = [row_stride(cache) for cache in into]
    digest = blake2b(msgspec.msgpack.encode((locations, strides)), digest_size=16).hexdigest()
    return Signature(
        f"caches {digest}",
        "the caches are at different offsets on the ranks, or their rows lie apart by different "
        "strides: allocate them in the same order, with the same sizes, on all ranks "
        "(pytorch#178138), and pass the same slices of them",
    )


def _check_cache(cache: torch.Tensor, x: torch.Tensor, name: str) -> None:
    check_tensor(name, cache)
    if cache.ndim < 1:
        raise ValueError(f"{name} is {cache!r:.80}; it must be a cache tensor of rows, [slots, …]")
    if cache.shape[1:] != x.shape[1:] or cache.dtype != x.dtype or cache.device != x.device:
        raise ValueError(
            f"{name} is {describe(cache)} and its rows come from {describe(x)}: dtype, device and "
            f"the shape after the first dimension must be equal. {_how_to_fit(cache, x)}"
        )
    if not is_plain_view(cache):
        raise ValueError(
            f"{name} {describe(cache)} is a conjugated or negated view; pass the plain tensor"
        )
    if not (cache.is_contiguous() or _has_dense_rows(cache)):
        raise ValueError(
            f"{name} {describe(cache)} has strides {list(cache.stride())}; each of its rows must "
            f"be dense and must not overlap the next one: pass a contiguous cache, a column slice "
            f"of one (cache[..., :512]), or one layer of one (cache[:, layer])"
        )
    check_no_grad(name, cache)


def _how_to_fit(cache: torch.Tensor, x: torch.Tensor) -> str:
    """Return what to do about rows that do not fit a cache: the first difference decides."""
    if cache.device != x.device:
        return f"Move the rows before the gather: rows.to({str(cache.device)!r})"
    if cache.dtype != x.dtype:
        advice = f"A gather copies bits. Convert the rows before it: rows.to({cache.dtype})"
        if cache.element_size() < x.element_size():
            advice += (
                f" sends {cache.element_size()} instead of {x.element_size()} bytes per element; "
                f"if the cache is quantized, divide them by its scale first"
            )
        elif cache.element_size() == x.element_size():
            advice += f", or rows.view({cache.dtype}) if the cache holds the bits of {x.dtype}"
        return advice
    if cache.ndim > 1 and cache.shape[2:] == x.shape[1:]:
        return f"For a cache of pages pass its rows: cache.view({_sizes(x)})"
    if cache.shape[1:].numel() == x.shape[1:].numel():
        return f"Reshape the rows before the gather: rows.reshape({_sizes(cache)})"
    return "To fill a part of every cache row, pass a column slice of the cache: cache[..., :512]"


def _sizes(like: torch.Tensor) -> str:
    """Return the arguments that reshape rows to those of another tensor, for example -1, 8, 128."""
    return ", ".join(str(size) for size in (-1, *like.shape[1:]))


def _has_dense_rows(cache: torch.Tensor) -> bool:
    """Return True when rows are dense and do not overlap; they may lie apart."""
    return cache[:1].is_contiguous() and row_stride(cache) >= cache.shape[1:].numel()


def _check_slots(
    slots: torch.Tensor, metadata: ContextParallelMetadata, device: torch.device
) -> None:
    check_readable("slots", slots)
    total = metadata.total_tokens
    is_fine = isinstance(slots, torch.Tensor) and slots.dtype in (torch.int64, torch.int32)
    if not is_fine or list(slots.shape) != [total] or slots.device != device:
        got = describe(slots) if isinstance(slots, torch.Tensor) else repr(slots)
        raise ValueError(
            f"slots is {got}; it must be int64 or int32 [{total}] on {device}, the row of each "
            f"token: use slots.to({str(device)!r}, torch.int64), and -1 for tokens that are not to "
            f"be stored"
        )
    check_tensor("slots", slots)


def _check_slot_values(values: torch.Tensor, rows: int) -> None:
    least, most = int(values.min()), int(values.max())
    if least < -1 or most >= rows:
        raise ValueError(
            f"slots go from {least} to {most}; each must be a cache row, 0 to {rows - 1}, or -1 to "
            f"skip the token"
        )
    stored = values[values >= 0]
    named = np.zeros(rows, dtype=np.bool_)  # sorting the slots would take ten times as long
    named[stored.numpy()] = True
    if int(named.sum()) < len(stored):
        row = int(stored.bincount().argmax())
        raise ValueError(
            f"slots name a row twice: row {row} is the slot of {int((stored == row).sum())} "
            f"tokens. Every stored token needs a row of its own; use -1 for tokens that are not to "
            f"be stored, such as padding"
        )


def _check_overlap(into: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """Check that no cache shares memory with another tensor: its rows would be overwritten.

    Slices of one cache can interleave: then each pair of tensors is compared exactly.
    """
    extents = [(*extent(x), True) for x in into] + [(*extent(x), False) for x in tensors]
    furthest = furthest_cache = 0  # the highest end so far
    for start, stop, is_cache in sorted(extents):
        if start < (furthest if is_cache else furthest_cache):  # rows can share memory with rows
            _check_pairs(into, tensors)
            return
        furthest = max(furthest, stop)
        if is_cache:
            furthest_cache = max(furthest_cache, stop)


class _Span(NamedTuple):
    """The memory of a tensor: `rows` of `width` bytes, `pitch` bytes apart, from `start` on."""

    start: int
    stop: int
    rows: int
    width: int
    pitch: int
    name: str
    is_cache: bool


def _span(name: str, x: torch.Tensor, *, is_cache: bool) -> _Span:
    """Describe the memory of a tensor. If its rows are not dense, all of it is one wide row."""
    start, stop = extent(x)
    if _has_dense_rows(x):
        width, pitch = x.shape[1:].numel() * x.element_size(), row_stride(x) * x.element_size()
        return _Span(start, stop, len(x), width, pitch, name, is_cache)
    return _Span(start, stop, 1, stop - start, stop - start, name, is_cache)


def _check_pairs(into: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    spans = [_span(f"into[{i}]", x, is_cache=True) for i, x in enumerate(into)]
    spans += [_span(f"tensors[{i}]", x, is_cache=False) for i, x in enumerate(tensors)]
    spans.sort()
    for number, first in enumerate(spans):
        for second in spans[number + 1 :]:
            if second.start >= first.stop:
                break
            if (first.is_cache or second.is_cache) and _share_bytes(first, second):
                raise ValueError(
                    f"{second.name} and {first.name} share memory; every tensor needs its own "
                    f"cache, or its own columns of one"
                )


def _share_bytes(first: _Span, second: _Span) -> bool:
    """Return whether two tensors whose extents overlap share a byte; `second` starts later.

    first    aaa···aaa···aaa···     rows of 3 bytes, pitch 6
    second        bb····bb····      begins at row 0, column 5: row 0 of it ends in row 1 of first
    """
    if first.pitch != second.pitch:
        return True
    row, column = divmod(second.start - first.start, first.pitch)
    begins_inside = column < first.width and row < first.rows
    reaches_next = column + second.width > first.pitch and row + 1 < first.rows
    return begins_inside or reaches_next


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
