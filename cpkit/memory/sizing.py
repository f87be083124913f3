"""Sizes: a pool's arena, the room that the largest batch needs in it, the memory of one gather."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from cpkit.algorithms import TABLE
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.allocator import MAX_BYTES, rounded
from cpkit.memory.backend import Backend
from cpkit.settings import symm_prealloc_bytes
from cpkit.sync.agreement import Agreement, Signature


def warm_up_bytes(max_tokens: int, row_bytes: int, cp_size: int, sequences: int) -> int:
    """Return the bytes that gathers of one tensor of up to `max_tokens` tokens need.

    The sum is twice the peak allocation of the most demanding algorithm, a receive buffer and a
    padded shard, because blocks return to the pool only at the next call. Each sequence can add two
    rows to the longest rank.
    """
    padded_rows = -(-max_tokens // cp_size) + 2 * sequences
    recv_bytes = rounded(padded_rows * cp_size * row_bytes)
    return 2 * (recv_bytes + rounded(padded_rows * row_bytes))


class Demand(NamedTuple):
    """The bytes that a gather needs on each rank: in the pool, and in ordinary memory."""

    shared: int
    ordinary: int


def gather_demand(
    metadata: ContextParallelMetadata, max_len: int, row_bytes: int, algorithm: str
) -> Demand:
    """Return the memory of a gather on the CPU: shards of `max_len` rows of `row_bytes` bytes.

    `row_bytes` is that of all tensors together. The most is in use during the last pass, reorder,
    or in the ordinary collective, where gloo has another receive buffer.
    """
    table = TABLE[algorithm]
    result = metadata.total_tokens * row_bytes
    if table.passes == ("wire",):
        return Demand(result, 0)
    shard = max_len * row_bytes
    recv = shard * metadata.cp_size
    shared = table.symmetric_send * shard + table.symmetric_recv * recv
    gloo = 0 if table.symmetric_recv else recv
    return Demand(shared, shard + recv - shared + max(gloo, 2 * result))


def agree_on_prealloc(backend: Backend, group: CPGroup, prealloc: int | None) -> int:
    """Return one arena size in bytes for all ranks. Collective.

    The default depends on the free memory of each rank, so all ranks use the smallest.
    """
    exchange = group.store_exchange
    purpose = "agree on the pool's size"
    with Agreement(lambda message: exchange.exchange(message, purpose)) as call:
        if prealloc is None:
            offer = rounded(symm_prealloc_bytes() or backend.default_prealloc())
        elif isinstance(prealloc, int) and 0 < prealloc <= MAX_BYTES:
            offer = rounded(prealloc)
        else:
            raise ValueError(
                f"prealloc is {prealloc!r} bytes; it must be 1 to {MAX_BYTES}, or None for the "
                f"default"
            )
        call.must_match(Signature("the pool's size"))
        call.state = offer.to_bytes(8, "little")
    offers = [int.from_bytes(state, "little") for state in call.states]
    return min(offers) if prealloc is None else offer


def check_warm_up(
    max_tokens: object, trailing_shape: object, dtype: object, tensors: object, sequences: object
) -> None:
    """Check the arguments of `SymmetricPool.warm_up`. Raises ValueError."""
    counts = {"max_tokens": max_tokens, "tensors": tensors, "sequences": sequences}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more")
    if not isinstance(trailing_shape, list | tuple) or not all(
        type(n) is int and n >= 0 for n in trailing_shape
    ):
        raise ValueError(
            f"trailing_shape is {trailing_shape!r}; it must be a row's shape, such as (8, 128)"
        )
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; it must be a torch.dtype")
    if math.prod((*counts.values(), *trailing_shape)) * dtype.itemsize > MAX_BYTES // 8:
        raise ValueError(
            f"{max_tokens} tokens of {list(trailing_shape)} {dtype} are too many for any memory"
        )
