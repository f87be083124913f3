"""Symmetric memory: buffers that every rank allocated alike, and that all peers address directly.

    with use_symmetric_memory(group):
        recv = torch.empty(rows * group.size, 8, 128)      # the group's pool, same offset
        everywhere

    pool = symmetric_pool(group) pool.peer_view(recv, 1)                                # rank 1's
    recv: an ordinary tensor over it

Only ranks of one machine can share memory; a group that spans machines allocates as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec
import torch

from cpkit import factory
from cpkit.arena import PoolStatistics
from cpkit.group import CPGroup
from cpkit.path import PathReport, Place, decide
from cpkit.pool import SymmetricPool, locate
from cpkit.shm import SymmetricMemoryError

__all__ = [
    "PathReport",
    "PoolStatistics",
    "SymmetricMemoryError",
    "SymmetricPool",
    "batch_symmetry",
    "check_group",
    "explain_path",
    "is_allocation_symmetric",
    "symmetric_pool",
    "use_symmetric_memory",
]

_batch_is_symmetric: ContextVar[bool] = ContextVar("batch_is_symmetric", default=True)


@contextmanager
def use_symmetric_memory(group: CPGroup, disabled: bool = False) -> Iterator[None]:
    """Tensors made inside by torch.empty, zeros, full, new_empty, … come from the group's pool.

    Collective: every rank of the group makes the same tensors in the same order. With `disabled`,
    and for a group that spans machines, allocation is the ordinary one. Source: SGLang
    `pynccl_allocator.use_symmetric_memory` (PR #8934, #24040).
    """
    check_group(group)
    if disabled or group.spans_hosts:
        yield
        return
    with factory.redirect(symmetric_pool(group).empty):
        yield


def is_allocation_symmetric() -> bool:
    """Whether this batch has equal sizes on all ranks, so that it may use symmetric memory."""
    return _batch_is_symmetric.get()


@contextmanager
def batch_symmetry(symmetric: bool) -> Iterator[None]:
    """Declare whether the batch that is processed inside has equal sizes on all ranks.

    Upstream decides this from its data-parallel padding mode. All ranks must say the same.
    """
    token = _batch_is_symmetric.set(symmetric)
    try:
        yield
    finally:
        _batch_is_symmetric.reset(token)


def symmetric_pool(group: CPGroup) -> SymmetricPool:
    """The group's pool, made at the first call; that call is collective over the group."""
    check_group(group)
    pool = group.transport
    return pool if isinstance(pool, SymmetricPool) else SymmetricPool(group)


def explain_path(send: torch.Tensor, recv: torch.Tensor, group: CPGroup) -> PathReport:
    """Which path a gather of these buffers takes, and what is missing for a better one.

    Collective over the group: a buffer is symmetric only if it is so on every rank.
    """
    check_group(group)
    if group.spans_hosts:
        reason = f"the group spans machines (ranks {list(group.ranks)}), which cannot share memory"
        return PathReport("fallback", reason, "ordinary memory", "ordinary memory")
    place = Place(locate(send, group), locate(recv, group))
    meet = group.transport.meet if group.transport else group.meet
    notes = meet("explain_path", extra=msgspec.msgpack.encode(place))
    return decide([msgspec.msgpack.decode(note, type=Place) for note in notes], group.rank)


def check_group(group: CPGroup) -> None:
    """Raise ValueError unless this is a group. Local: without one there is nobody to tell."""
    if not isinstance(group, CPGroup):
        raise ValueError(f"group is {group!r}; pass what init_context_parallel(cp_size) returned")
