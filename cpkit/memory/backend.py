"""What a kind of memory has to offer so that a pool can be made of it; the one place that chooses.

cpu    POSIX shared memory (cpkit.sync.shm)        ranks of one machine
cuda   torch.distributed._symmetric_memory    GPUs with peer access, or ranks that share one GPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from cpkit.group import CPGroup


class Segment(Protocol):
    """One allocation of `nbytes` on every rank of a group; `addresses`, by rank, hold here."""

    nbytes: int
    addresses: list[int]

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of a rank's memory: uint8 `[nbytes]`."""

    def block(self, offset: int, nbytes: int, release: Callable[[], object]) -> torch.Tensor:
        """Own bytes; calls `release` when the last tensor over them has gone."""


class Backend(Protocol):
    """One kind of symmetric memory of one group."""

    name: str
    device: torch.device

    def default_prealloc(self) -> int:
        """Bytes of the arena when the user names no size."""

    def make_segment(self, nbytes: int, purpose: str) -> Segment:
        """Allocate on every rank and map the peers'. Collective, with a deadline.

        Raises SymmetricMemoryError on every rank when one of them can't.
        """

    def enter(self) -> None:
        """Wait until every rank's buffers may be written. Collective."""

    def leave(self) -> None:
        """Wait until everything that ranks wrote has landed. Collective."""

    def put_signal(self, peer: int) -> None:
        """Tell a peer that this rank's stores before it have landed, once it took the last word."""

    def wait_signal(self, peer: int) -> None:
        """Wait for a peer's word, and take it."""

    def late_words(self) -> str:
        """Which rank a wait on the device was given up for, in words; empty when none was."""

    def check(self) -> None:
        """Raise BarrierTimeout when a wait on the device has been given up. Local."""

    def transport(self) -> str:
        """Who moves the rows of an equal-sized gather: see cpkit.memory.path."""

    def window_problem(self) -> str:
        """Why NCCL, where it moves the rows, does not know this memory; empty when all is well."""


def make_backend(group: CPGroup, device: str) -> Backend:
    """The backend for tensors on this kind of device. Collective over the group.

    Raises ValueError for a device without one.
    """
    if device == "cpu":
        from cpkit.memory.posix import PosixBackend

        return PosixBackend(group)
    if device == "cuda" and torch.cuda.is_available():
        from cpkit.memory.cuda import CudaBackend

        return CudaBackend(group)
    raise ValueError(
        f"there is no symmetric memory on {device!r} here; use 'cpu'"
        + (", or 'cuda' on a machine where torch sees a GPU" if device == "cuda" else " or 'cuda'")
    )
