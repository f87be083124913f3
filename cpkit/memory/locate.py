"""Locate a buffer relative to a group: in its pool, in another pool, or in ordinary memory."""

from __future__ import annotations

import torch

from cpkit.devices import check_tensor, is_plain_view
from cpkit.group import CPGroup
from cpkit.memory.path import BufferLocation, BufferPair
from cpkit.sync.collective import describe, owner_of


def check_plain_view(tensor: torch.Tensor) -> None:
    """Check that a tensor's memory holds its values. Raises ValueError."""
    if not is_plain_view(tensor):
        raise ValueError(
            f"{describe(tensor)} is a conjugated or negated view; pass the plain tensor"
        )


def not_in_pool(tensor: torch.Tensor) -> ValueError:
    """Return the error for anything but a tensor of a pool."""
    check_tensor("the tensor", tensor)  # raises a better one
    return ValueError(
        f"{describe(tensor)} is not a tensor of this group's pool; make it inside "
        f"`with use_symmetric_memory(group)`"
    )


def locate_pair(send: torch.Tensor, recv: torch.Tensor, group: CPGroup) -> BufferPair:
    """Return the locations of this rank's buffers of a gather."""
    return BufferPair(locate_buffer(send, group), locate_buffer(recv, group), send.nbytes)


def locate_buffer(tensor: torch.Tensor, group: CPGroup) -> BufferLocation:
    """Return where a buffer is: in the group's pool, in another pool, or in ordinary memory."""
    location = locate_start(tensor, group)
    if not (location.other or tensor.is_contiguous()):
        return BufferLocation(other="in the pool but not contiguous", fault="unregistered")
    return location


def locate_start(tensor: torch.Tensor, group: CPGroup) -> BufferLocation:
    """Return where a tensor begins; it may be strided."""
    pool = group.pools.get(tensor.device.type)
    found = pool.locate(tensor) if pool else None
    if found:
        return BufferLocation(*found)
    owner = owner_of(tensor)
    if owner:
        return BufferLocation(
            other=f"in the pool of another group (ranks {list(owner.ranks)}), "
            f"or in a pool that has been replaced",
            fault="foreign",
        )
    return BufferLocation(other="ordinary memory", fault="unregistered")
