"""How large the arena is that a symmetric pool makes up front."""

from __future__ import annotations

import math
import os

import msgspec
import torch

from cpkit.memory.allocator import MAX_BYTES, rounded
from cpkit.sync.exchange import StoreExchange


def agree_on_prealloc(rendezvous: StoreExchange, prealloc: int | None, default: int) -> int:
    """One arena size in bytes for all ranks; collective.

    None asks for the default: `CPKIT_SYMM_PREALLOC_GB`, else `default`, which comes from what was
    free when this rank looked, so the least of all ranks' figures counts. Raises ValueError on
    every rank for a size below 1.
    """
    problem, offer = "", 0
    if prealloc is None:
        problem, offer = _default(default)
    elif isinstance(prealloc, int) and 0 < prealloc <= MAX_BYTES:
        offer = rounded(prealloc)
    else:
        problem = (
            f"prealloc is {prealloc!r} bytes; it must be 1 to {MAX_BYTES}, or None for the default"
        )
    note = msgspec.msgpack.encode((problem, offer))
    answers = rendezvous.exchange(note, "agree on the pool's size")
    said = [msgspec.msgpack.decode(answer, type=tuple[str, int]) for answer in answers]
    problems = [text for text, _ in said if text]
    if problems:
        raise ValueError(problems[0])
    return min(size for _, size in said) if prealloc is None else offer


def warm_up_problem(
    max_tokens: object, trailing_shape: object, dtype: object, tensors: object, sequences: object
) -> str:
    """Why `SymmetricPool.warm_up` refuses these; empty when it doesn't."""
    counts = {"max_tokens": max_tokens, "tensors": tensors, "sequences": sequences}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            return f"{name} is {value!r}; it must be a whole number, 1 or more"
    if not isinstance(trailing_shape, list | tuple) or not all(
        type(n) is int and n >= 0 for n in trailing_shape
    ):
        return f"trailing_shape is {trailing_shape!r}; it must be a row's shape, such as (8, 128)"
    if not isinstance(dtype, torch.dtype):
        return f"dtype is {dtype!r}; it must be a torch.dtype"
    if math.prod((*counts.values(), *trailing_shape)) * dtype.itemsize > MAX_BYTES // 8:
        return f"{max_tokens} tokens of {list(trailing_shape)} {dtype} are too many for any memory"
    return ""


def warm_up_bytes(max_tokens: int, row_bytes: int, cp_size: int, sequences: int) -> int:
    """Bytes that gathers of one tensor of up to `max_tokens` tokens need.

    What the neediest algorithm has alive, a receive buffer and a padded shard, twice: blocks return
    to the pool only at the next call. Each sequence can make the longest rank two rows longer.
    """
    padded_rows = -(-max_tokens // cp_size) + 2 * sequences
    recv_bytes = rounded(padded_rows * cp_size * row_bytes)
    return 2 * (recv_bytes + rounded(padded_rows * row_bytes))


def _default(default: int) -> tuple[str, int]:
    chosen_gb = os.environ.get("CPKIT_SYMM_PREALLOC_GB")
    if not chosen_gb:
        return "", rounded(default)
    try:
        nbytes = int(float(chosen_gb) * (1 << 30))
    except (ValueError, OverflowError):
        nbytes = 0
    if not 1 <= nbytes <= MAX_BYTES:
        return f"CPKIT_SYMM_PREALLOC_GB is {chosen_gb!r}; it must be GiB, such as 4 or 0.5", 0
    return "", rounded(nbytes)
