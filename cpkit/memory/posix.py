"""Symmetric memory on the CPU: POSIX shared memory, synchronized by the group's board."""

from __future__ import annotations

import torch

from cpkit.group import CPGroup
from cpkit.sync.shm import Segment, free_bytes, make_segment
from cpkit.sync.signals import ShmSignals

_MAX_DEFAULT_BYTES = 64 << 20


class PosixBackend:
    """Shared files that every rank maps. Making one is collective; stores are complete at once."""

    name = "POSIX shared memory"
    device = torch.device("cpu")

    def __init__(self, group: CPGroup) -> None:
        self._group = group
        self._signals = ShmSignals(group.rendezvous)

    def default_prealloc(self) -> int:
        """An eighth of the free shared memory, shared out among the ranks; at most 64 MiB."""
        return min(free_bytes() // (8 * self._group.size), _MAX_DEFAULT_BYTES)

    def make_segment(self, nbytes: int, purpose: str) -> Segment:
        """See cpkit.sync.shm.make_segment."""
        return make_segment(self._group.rendezvous, nbytes, purpose)

    def enter(self) -> None:
        """Nothing: the meeting before every gather has seen all ranks done with their buffers."""

    def leave(self) -> None:
        """A barrier: what a rank stored before it, its peers read after it."""
        self._group.barrier()

    def put_signal(self, peer: int) -> None:
        """Complete on return; see cpkit.sync.signals."""
        self._signals.put(peer)

    def wait_signal(self, peer: int) -> None:
        """The host waits. Raises BarrierTimeout naming the peer."""
        self._signals.take(peer)

    def late_words(self) -> str:
        """Nobody: a barrier that is given up raises where it waits."""
        return ""

    def check(self) -> None:
        """Nothing: a barrier that is given up raises where it waits."""

    def transport(self) -> str:
        """Ranks push."""
        return "posix"

    def window_problem(self) -> str:
        """NCCL has no part in this."""
        return ""
