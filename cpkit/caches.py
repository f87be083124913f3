"""Paged KV caches that a gather stores into: check them and their slots, view and fill them.

The checks raise ValueError, as those of cpkit.validate do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from cpkit.devices import (
    check_no_grad,
    check_readable,
    check_tensor,
    is_capturing,
    is_plain_view,
)
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import LANES, row_stride, same_lanes
from cpkit.memory.locate import locate_start
from cpkit.sync.agreement import Signature
from cpkit.sync.collective import describe, extent


def cache_as_rows(cache: torch.Tensor) -> torch.Tensor:
    """View a cache `[slots, …]` as `[slots, lanes]` without a copy; its rows may lie apart."""
    row_items, size = math.prod(cache.shape[1:]), cache.element_size()
    if row_items == 0:
        return torch.empty(cache.shape[0], 0, dtype=torch.uint8, device=cache.device)
    pitch, offset = row_stride(cache), int(cache.storage_offset())
    flat = cache.detach().as_strided((cache.shape[0], row_items), (pitch, 1))
    return flat.view(LANES[(row_items | pitch | offset) * size % 8])


def scatter_into(
    caches: Sequence[torch.Tensor], gathered: Sequence[torch.Tensor], slots: torch.Tensor
) -> None:
    """Store token t at row `slots[t]` of each cache, `[slots, lanes]`; skip it where that is -1."""
    stored = (slots >= 0).nonzero().flatten()
    for cache, rows in zip(caches, gathered, strict=True):
        target, source = same_lanes(cache, rows)
        target.index_copy_(0, slots[stored], source[stored])


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
    _check_slots(slots, metadata, tensors[0].device)
    _check_overlap(into, tensors, slots)
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


def _check_overlap(
    into: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], slots: torch.Tensor
) -> None:
    """Check that no cache shares memory with another tensor: its values would be overwritten.

    Slices of one cache can interleave: then each pair of tensors is compared exactly.
    """
    read = (*tensors, slots)
    extents = [(*extent(x), True) for x in into] + [(*extent(x), False) for x in read]
    furthest = furthest_cache = 0  # the highest end so far
    for start, stop, is_cache in sorted(extents):
        if start < (furthest if is_cache else furthest_cache):  # those that are read may overlap
            _check_pairs(into, tensors, slots)
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


def _check_pairs(
    into: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], slots: torch.Tensor
) -> None:
    spans = [_span(f"into[{i}]", x, is_cache=True) for i, x in enumerate(into)]
    spans += [_span(f"tensors[{i}]", x, is_cache=False) for i, x in enumerate(tensors)]
    spans.append(_span("slots", slots, is_cache=False))
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
