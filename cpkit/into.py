"""Gathering straight into a paged KV cache: what is refused, and what all ranks must agree on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
import torch

from cpkit.devices import grad_problem, is_capturing, stores_as_shown
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.collective import describe
from cpkit.memory.pool import SymmetricPool
from cpkit.memory.where import locate


class _Caches(msgspec.Struct):
    """What a rank brings: digests of its caches' places and of its slots; the first cache that is
    not in the pool, in words.
    """

    places: int
    slots: int
    outside: str = ""


def read_slots(slots: torch.Tensor | None) -> torch.Tensor | None:
    """Slots where the host can look at them, which on CUDA waits for the stream; None without any,
    and while a graph is captured.
    """
    return None if slots is None or is_capturing(slots.device.type) else slots.cpu()


def into_problem(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    into: Sequence[torch.Tensor] | None,
    slots: torch.Tensor | None,
) -> str:
    """Why caches and slots are refused, by all but the slots' values; empty when they aren't."""
    if into is None and slots is None:
        return ""
    if into is None or slots is None:
        return "into and slots go together: the caches, and the row of each token in them"
    if not isinstance(into, list | tuple) or len(into) != len(tensors):
        return f"into has {_count(into)} caches for {len(tensors)} tensors; it needs one a tensor"
    for number, (cache, x) in enumerate(zip(into, tensors, strict=True)):
        problem = _cache_problem(cache, x, f"into[{number}]")
        if problem:
            return problem
    problem = _overlap_problem(into, tensors)
    return problem or _slots_problem(slots, metadata, tensors[0].device)


def values_problem(known: torch.Tensor | None, into: Sequence[torch.Tensor] | None) -> str:
    """Why the values of slots that `read_slots` read are refused; empty when they aren't."""
    if known is None or into is None:
        return ""
    rows = min(len(cache) for cache in into)
    least, most = int(known.min()), int(known.max())
    if least < -1 or most >= rows:
        return f"slots go from {least} to {most}; the caches have rows 0 to {rows - 1}, -1 skips"
    stored = known[known >= 0]
    named = torch.zeros(rows, dtype=torch.bool, device="cpu")
    named[stored] = True  # sorting them takes ten times as long
    if int(named.sum()) < len(stored):
        return "slots name a row twice; every stored token needs a row of its own"
    return ""


def agree_on_caches(
    into: Sequence[torch.Tensor],
    known: torch.Tensor | None,
    group: CPGroup,
    pool: SymmetricPool | None,
) -> None:
    """Check that all ranks name the same rows of the same symmetric caches. Collective.

    Raises ValueError on every rank otherwise. Without a pool only the slots are compared, and
    those only when they are `known`.
    """
    places = [locate(cache, group) for cache in into] if pool else []
    outside = (f"into[{number}] is {place}" for number, place in enumerate(places) if place.other)
    digest = 0 if known is None else zlib.crc32(known.numpy().tobytes())
    mine = _Caches(zlib.crc32(msgspec.msgpack.encode(places)), digest, next(outside, ""))
    note = msgspec.msgpack.encode(mine)
    said = [msgspec.msgpack.decode(each, type=_Caches) for each in group.exchange(note)]
    faults = [f"rank {rank}: {each.outside}" for rank, each in enumerate(said) if each.outside]
    if faults:
        raise ValueError(
            "'direct' stores straight into every rank's cache, so the caches must be in the "
            "group's pool: allocate them once inside `with use_symmetric_memory(group)`, or use "
            f"another algorithm, which gathers first and then scatters. {'; '.join(faults)}"
        )
    if any(each.places != said[0].places for each in said):
        raise ValueError(
            "the caches stand at different offsets on the ranks: allocate them in the same order, "
            "with the same sizes, on all ranks (pytorch#178138)"
        )
    if any(each.slots != said[0].slots for each in said):
        raise ValueError("slots differ between the ranks; all ranks must name the same rows")


def _count(into: object) -> str:
    return str(len(into)) if isinstance(into, list | tuple) else type(into).__name__


def _cache_problem(cache: torch.Tensor, x: torch.Tensor, name: str) -> str:
    if not isinstance(cache, torch.Tensor) or cache.layout is not torch.strided or cache.ndim < 1:
        return f"{name} is {cache!r:.80}; it must be a cache tensor of rows, [slots, …]"
    if cache.shape[1:] != x.shape[1:] or cache.dtype != x.dtype or cache.device != x.device:
        return (
            f"{name} is {describe(cache)} and its rows come from {describe(x)}: dtype, device and "
            f"the shape after the first dimension must be equal"
        )
    if not (cache.is_contiguous() and stores_as_shown(cache)):
        return f"{name} {describe(cache)} must be contiguous, and no conjugated or negated view"
    return grad_problem(name, cache)


def _slots_problem(
    slots: torch.Tensor, metadata: ContextParallelMetadata, device: torch.device
) -> str:
    total = metadata.total_tokens
    is_fine = isinstance(slots, torch.Tensor) and slots.dtype == torch.int64
    if not is_fine or list(slots.shape) != [total] or slots.device != device:
        got = describe(slots) if isinstance(slots, torch.Tensor) else repr(slots)
        return f"slots is {got}; it must be int64 [{total}] on {device}, the row of each token"
    return "" if slots.is_contiguous() else "slots must be contiguous"


def _overlap_problem(into: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> str:
    """Rows would be overwritten before they are read, or by rows of another tensor."""
    named = [(*_extent(x), f"into[{i}]", True) for i, x in enumerate(into)]
    named += [(*_extent(x), f"tensors[{i}]", False) for i, x in enumerate(tensors)]
    furthest = furthest_cache = (0, "")  # where what lies before ends, and its name
    for start, stop, name, is_cache in sorted(named):
        end, other = furthest if is_cache else furthest_cache  # rows may share memory with rows
        if start < end:
            return f"{name} and {other} share memory; every tensor needs a cache of its own"
        furthest = max(furthest, (stop, name))
        if is_cache:
            furthest_cache = max(furthest_cache, (stop, name))
    return ""


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and after the last one; an empty tensor has none."""
    if not x.numel():
        return 0, 0
    items = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + items * x.element_size()
