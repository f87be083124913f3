"""Where a buffer is, seen from a group: in its pool, in another one's, or in ordinary memory."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch

from cpkit.group import CPGroup
from cpkit.memory.collective import in_symmetric_memory
from cpkit.memory.path import BufferLocation, BufferPair


class Pool(Protocol):
    """What of a symmetric pool is needed here."""

    group: CPGroup
    device: torch.device

    def locate(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """(segment, byte offset) of a tensor's first element, or None when it lives elsewhere."""


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def register(pool: Pool) -> None:
    """From now on, tensors of this pool are told apart from ordinary ones."""
    _pools.add(pool)


def place_of(send: torch.Tensor, recv: torch.Tensor, group: CPGroup) -> BufferPair:
    """Where this rank's buffers of a gather are."""
    shard_bytes = send.numel() * send.element_size() if isinstance(send, torch.Tensor) else 0
    return BufferPair(locate(send, group), locate(recv, group), shard_bytes)


def locate(tensor: torch.Tensor, group: CPGroup) -> BufferLocation:
    """Where a buffer is."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return BufferLocation(other="no ordinary tensor", fault="unregistered")
    own: object = group.pools.get(tensor.device.type)
    for pool in _pools:
        place = pool.locate(tensor) if pool.device.type == tensor.device.type else None
        if place and pool is not own:
            return BufferLocation(
                other=f"in the pool of another group (ranks {list(pool.group.ranks)}), "
                f"or in one that was configured away",
                fault="foreign",
            )
        if place and not tensor.is_contiguous():
            return BufferLocation(other="in the pool but not contiguous", fault="unregistered")
        if place:
            return BufferLocation(*place)
    if in_symmetric_memory(tensor):
        return BufferLocation(other="in a pool that was configured away", fault="foreign")
    return BufferLocation(other="ordinary memory", fault="unregistered")
