"""What a gather accepts, and how it says no: got, allowed, what to call instead.

Nothing here raises. A rank that raised alone would leave its peers waiting in the collective, so a
problem is words that the ranks exchange when they meet, and then all of them raise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from cpkit.algorithms import ALGORITHMS
from cpkit.devices import device_problem, grad_problem
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.collective import describe

_NO_METADATA = (
    "the metadata is {0!r}; pass what prepare_context_parallel_metadata(lengths, cp_size) returned"
)


_Likeness = tuple[object, ...]
_fine: dict[_Likeness, str] = {}  # calls that were fine, in words, by all that makes them so
_MOST_REMEMBERED = 256


def check_call(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    symmetric: bool,
) -> tuple[str, str]:
    """(why all_gather_kv refuses these arguments, the call in words); one of them is empty.

    A model makes the same call layer after layer: one like a call that was fine is not taken apart
    again. Only ordinary tensors are remembered.
    """
    like = _likeness(tensors, metadata, group, algorithm, symmetric)
    known = _fine.get(like) if like else None
    if known:
        return "", known
    found = problem(tensors, metadata, group, algorithm)
    if found:
        return found, ""
    call = describe_call(tensors, metadata, algorithm, symmetric)
    if like:
        if len(_fine) >= _MOST_REMEMBERED:
            _fine.clear()
        _fine[like] = call
    return "", call


def _likeness(
    tensors: Any, metadata: object, group: CPGroup, algorithm: object, symmetric: bool
) -> _Likeness | None:
    """All that `problem` and `describe_call` look at; None for what they have to see themselves."""
    if type(tensors) not in (list, tuple) or type(metadata) is not ContextParallelMetadata:
        return None
    if type(algorithm) is not str:
        return None
    like: list[object] = [metadata, group.rank, group.size, algorithm, symmetric]
    for x in tensors:
        if type(x) is not torch.Tensor or x.layout is not torch.strided or x.is_nested:
            return None
        if grad_problem("", x):
            return None
        like += (x.shape, x.dtype, x.device)
        if x.is_cuda:
            like.append(torch.cuda.current_device())
    return tuple(like)


def problem(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
) -> str:
    """Why all_gather_kv refuses these arguments; empty when it doesn't."""
    if algorithm not in ALGORITHMS:
        return f"algorithm is {algorithm!r}; it must be one of {', '.join(ALGORITHMS)}"
    if not isinstance(metadata, ContextParallelMetadata):
        return _NO_METADATA.format(metadata)
    if metadata.cp_size != group.size:
        return (
            f"the metadata is for cp_size {metadata.cp_size} and the group has {group.size} ranks; "
            f"use init_context_parallel({metadata.cp_size})"
        )
    if not isinstance(tensors, list | tuple) or not tensors:
        return (
            f"tensors is {type(tensors).__name__}; it must be a list of at least one tensor, "
            f"for example [k, v]"
        )
    devices = {str(x.device) for x in tensors if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        return f"tensors are on {', '.join(sorted(devices))}; gather those of one device in a call"
    faults = (
        _rows_problem(x, metadata, group, f"tensors[{number}]") for number, x in enumerate(tensors)
    )
    return next(filter(None, faults), "")


def _rows_problem(
    x: torch.Tensor, metadata: ContextParallelMetadata, group: CPGroup, name: str
) -> str:
    rows = metadata.per_rank_actual_token[group.rank]
    if not isinstance(x, torch.Tensor):
        return f"{name} is {x!r}; it must be a tensor of this rank's rows"
    if x.layout is not torch.strided or x.is_nested:
        kind = "is nested" if x.is_nested else f"has layout {x.layout}"
        return f"{name} {kind}; it must be an ordinary strided tensor"
    unfit = device_problem(name, x) or grad_problem(name, x)
    if unfit:
        return unfit
    if x.ndim < 1 or x.shape[0] != rows:
        return (
            f"{name} is {describe(x)}, and rank {group.rank} holds {rows} rows of this batch "
            f"(per_rank_actual_token); use layout.shard(x, metadata, {group.rank})"
        )
    return ""


def seed_problem(
    x: torch.Tensor,
    total_len: int,
    cp_size: int,
    metadata: ContextParallelMetadata | None,
    group: CPGroup,
) -> str:
    """Why the seed's functions refuse these arguments; empty when they don't."""
    if not isinstance(metadata, ContextParallelMetadata):
        return _NO_METADATA.format(metadata)
    if not isinstance(total_len, int) or isinstance(total_len, bool):
        return f"total_len is {total_len!r}; it must be a whole number of tokens"
    if type(cp_size) is not int:
        return f"cp_size is {cp_size!r}; it must be a whole number of ranks"
    if cp_size != group.size or cp_size != metadata.cp_size:
        return (
            f"cp_size is {cp_size}; the metadata is for {metadata.cp_size} and the current group "
            f"has {group.size} ranks. All three must be equal: call init_context_parallel first"
        )
    max_len, needed = -(-total_len // cp_size), metadata.max_rank_len[0]
    held = list(metadata.per_rank_actual_token)
    if max_len < needed:
        return (
            f"total_len={total_len} over {cp_size} ranks pads to {max_len} rows, but a rank holds "
            f"{needed} (rows by rank: {held}): rows would be cut off. "
            f"ceil(total_len / cp_size) fits one sequence only; pass total_len={needed * cp_size} "
            f"(max_rank_len · cp_size), or call all_gather_kv"
        )
    return _rows_problem(x, metadata, group, "input_tensor")


def describe_call(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    algorithm: str,
    symmetric: bool,
) -> str:
    """An all_gather_kv call in words: equal on all ranks exactly when they may go on together."""
    rows = tuple((x.shape[1:], x.dtype, x.device.type) for x in tensors)
    return _describe(rows, metadata, algorithm, symmetric)


@lru_cache(maxsize=256)
def _describe(
    rows: tuple[tuple[torch.Size, torch.dtype, str], ...],
    metadata: ContextParallelMetadata,
    algorithm: str,
    symmetric: bool,
) -> str:
    shapes = ", ".join(f"{list(shape)} {dtype} {device}" for shape, dtype, device in rows)
    layout = _describe_layout(metadata)
    return f"all_gather_kv({layout}, {algorithm=!s}, {symmetric=}, rows of {shapes})"


def describe_seed(
    x: torch.Tensor, total_len: int, metadata: ContextParallelMetadata, symmetric: bool
) -> str:
    """A call of the seed's functions in words."""
    return (
        f"cp_all_gather_reorganized_into_tensor_kv_cache(rows of {list(x.shape[1:])} {x.dtype} "
        f"{x.device.type}; {total_len=}, {_describe_layout(metadata)}, {symmetric=})"
    )


@lru_cache(maxsize=256)
def _describe_layout(metadata: ContextParallelMetadata) -> str:
    """Words for a layout, short for large batches, different for different ones."""
    lengths = list(metadata.lengths)
    shown = str(lengths) if len(lengths) <= 16 else f"[{lengths[0]}, … {len(lengths)} sequences]"
    check = zlib.crc32(repr(lengths).encode())
    return f"{metadata.strategy}, cp_size={metadata.cp_size}, lengths={shown} ({check:08x})"
