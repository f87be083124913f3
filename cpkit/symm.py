"""Symmetric memory: buffers at equal offsets on all ranks, which every rank addresses directly.

    with use_symmetric_memory(group):
        recv = torch.empty(rows * group.size, 8, 128)  # the group's pool, one offset on all ranks

    pool = symmetric_pool(group)
    pool.peer_view(recv, 1)  # rank 1's recv, as an ordinary tensor

Only the ranks of one machine can share memory; a group that spans machines allocates as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import torch

from cpkit.devices import check_tensor, device_type
from cpkit.eager import eager_only
from cpkit.group import CPGroup, batch_symmetry, is_allocation_symmetric
from cpkit.memory import factory
from cpkit.memory.backend import Backend
from cpkit.memory.locate import locate_pair
from cpkit.memory.ordinary import spanning_machines
from cpkit.memory.path import BufferPair, PathReport, decide, nccl_version
from cpkit.memory.pool import SymmetricPool
from cpkit.memory.statistics import PoolStatistics
from cpkit.sync.agreement import Signature
from cpkit.sync.exchange import SymmetricMemoryError
from cpkit.validate import check_group

__all__ = [
    "PathReport",
    "PoolStatistics",
    "SymmetricMemoryError",
    "SymmetricPool",
    "batch_symmetry",
    "explain_path",
    "is_allocation_symmetric",
    "put_signal",
    "symmetric_pool",
    "use_symmetric_memory",
    "wait_signal",
]


@contextmanager
def use_symmetric_memory(group: CPGroup, disabled: bool = False) -> Iterator[None]:
    """Allocate tensors made inside by torch.empty, zeros, new_empty, … in the group's pool.

    Collective: every rank of the group makes the same tensors in the same order. With `disabled`,
    and for a group that spans machines, torch allocates as usual. Source: SGLang
    `pynccl_allocator.use_symmetric_memory` (PR #8934, #24040).
    """
    check_group(group)
    if disabled or group.spans_hosts:
        yield
        return

    def allocate(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
        return symmetric_pool(group, device).empty(shape, dtype)

    with factory.redirect(allocate):
        yield


@eager_only
def symmetric_pool(group: CPGroup, device: str | None = None) -> SymmetricPool:
    """Return the group's pool on "cpu" or "cuda" (default: torch's default device).

    The first call makes it and is collective over the group.
    """
    check_group(group)
    pool = group.pools.get(device or torch.get_default_device().type)
    return pool if isinstance(pool, SymmetricPool) else SymmetricPool(group, device=device)


@eager_only
def put_signal(group: CPGroup, peer: int, device: str | None = None) -> None:
    """Signal one peer that this rank's stores into its memory have arrived. No barrier.

    Each rank has one signal word per peer; a second signal blocks until the peer has consumed the
    first. On CUDA both calls are kernels on the current stream. Source: torch's
    _SymmetricMemory.put_signal and wait_signal, and NVSHMEM's signal operations.

        rank 0   peer_view(inbox, 1).copy_(row) ─ put_signal(group, 1)
        rank 1                                     wait_signal(group, 0) ─ read inbox

    Before rank 0 stores the next row, rank 1 has to signal back that it has read this one. `device`
    is "cpu" or "cuda", and can be omitted when the group has symmetric memory on one only. Raises
    ValueError when `peer` is not a rank of the group, or when the group has no symmetric memory on
    `device` yet; TimeoutError after the deadline (on CUDA the kernel traps).
    """
    _backend_with(group, peer, device).put_signal(peer)


@eager_only
def wait_signal(group: CPGroup, peer: int, device: str | None = None) -> None:
    """Wait for a peer's `put_signal`, and consume the signal. Raises the same errors."""
    _backend_with(group, peer, device).wait_signal(peer)


def _backend_with(group: CPGroup, peer: int, device: str | None) -> Backend:
    check_group(group)
    group.check_thread()
    group.check_rank("peer", peer)
    known = sorted(group.pools)
    pool = group.pools.get(device or (known[0] if len(known) == 1 else ""))
    if not isinstance(pool, SymmetricPool):
        raise ValueError(
            f"device is {device!r}, and the group has symmetric memory on {known or 'no device'}; "
            f"name one of them, or allocate there first, inside `with use_symmetric_memory(group)`"
        )
    return pool.backend


@eager_only
def explain_path(
    send: torch.Tensor, recv: torch.Tensor, group: CPGroup, transport: str | None = None
) -> PathReport:
    """Explain which path a gather of these buffers takes, and what a better one requires.

    Collective over the group: a buffer is symmetric only if it is so on every rank. `transport`
    selects a transport other than the group's own: "posix", "cuda", or NCCL with its version, and
    with " NCCL_CTA_POLICY=2" after it the policy ZERO.

        >>> explain_path(send, recv, group).path                            # doctest: +SKIP
        'symmetric'
        >>> explain_path(send, recv, group, transport="nccl 2.28.9").path   # doctest: +SKIP
        'fallback'

    Raises ValueError on every rank for an unknown transport, a tensor without memory, or two
    devices.
    """
    check_group(group)
    if group.spans_hosts and transport is None:
        reason = spanning_machines(group)
        return PathReport("fallback", reason, "ordinary memory", "ordinary memory")
    with group.agreement([recv]) as call:
        nccl_version(transport or "posix")
        check_tensor("send", send)
        check_tensor("recv", recv)
        if send.device != recv.device:
            raise ValueError(f"send is on {send.device} and recv on {recv.device}; use one device")
        call.must_match(Signature(f"explain_path(transport={transport}) on {recv.device.type}"))
        call.state += msgspec.msgpack.encode(locate_pair(send, recv, group))
    pool = group.pools.get(device_type(recv))
    if isinstance(pool, SymmetricPool):
        return pool.decide(call, transport or "").path
    pairs = [msgspec.msgpack.decode(state, type=BufferPair) for state in call.states]
    return decide(pairs, group.rank, transport or "posix")
