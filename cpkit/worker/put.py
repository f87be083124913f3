"""Write stamps into every peer's memory, and read the stamps of the peers (`Put`).

    round n, with barriers      write n everywhere │ barrier │ read: n everywhere │ barrier │ next
    round n, without            write n everywhere, read: any round, next round

A stamp is `writer << 32 | round`, so a read shows which rank wrote it and in which round. A read is
stale if the peer has not written in this round yet, and ahead if the peer has already overwritten
the stamp in a later round.
"""

from __future__ import annotations

import numpy as np
import torch

from cpkit.control.messages import Array, Progress, Put, PutResult
from cpkit.devices import finish
from cpkit.group import CPGroup
from cpkit.settings import worker_device
from cpkit.symm import symmetric_pool, use_symmetric_memory
from cpkit.worker.operation import Operation, RankState, Steps

_ROUNDS_PER_STEP = 500
_MAX_EXAMPLES = 5
_ROUND_BITS = 32


class PutOperation(Operation[Put]):
    """Run the rounds, a fixed number of them per step."""

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Yield progress, and return the counts of all rounds."""
        rounds = self.body.rounds
        with use_symmetric_memory(group):
            mine = torch.zeros(group.size, dtype=torch.int64, device=worker_device())
        finish()
        group.barrier()
        stamps = _Stamps(mine, group, self.body.barrier)
        for first in range(1, rounds + 1, _ROUNDS_PER_STEP):
            if first > 1:
                yield Progress(first - 1, rounds, "rounds")
            group.barrier()
            for number in range(first, min(first + _ROUNDS_PER_STEP, rounds + 1)):
                stamps.run_round(number)
            group.barrier()
        return stamps.result(self.body)


class _Stamps:
    """One rank's memory, its views of the peers' memory, and what it has read."""

    def __init__(self, mine: torch.Tensor, group: CPGroup, barrier: bool) -> None:
        pool = symmetric_pool(group, mine.device.type)
        location = pool.locate(mine)
        self._mine, self._group, self._barrier = mine, group, barrier
        views = [pool.peer_view(mine, peer) for peer in range(group.size)]
        # On the CPU, a store takes microseconds in torch and much less in numpy.
        self._views = [view.numpy() for view in views] if mine.device.type == "cpu" else views
        self._offset = location[1] if location else -1
        self._reads = self._stale = self._ahead = 0
        self._row: list[int] = []
        self._examples: list[str] = []

    def run_round(self, number: int) -> None:
        """Write to all peers, then read what they wrote here."""
        rank = self._group.rank
        for view in self._views:
            view[rank] = rank << _ROUND_BITS | number
        finish()
        if self._barrier:
            self._group.barrier()
        self._row = self._mine.tolist()
        if self._barrier:
            self._group.barrier()
        for writer, stamp in enumerate(self._row):
            self._count(number, writer, stamp & ((1 << _ROUND_BITS) - 1))

    def _count(self, number: int, writer: int, found: int) -> None:
        self._reads += 1
        self._stale += found < number
        self._ahead += found > number
        if found != number and len(self._examples) < _MAX_EXAMPLES:
            self._examples.append(
                f"round {number}: rank {self._group.rank} read round {found} of rank {writer}"
            )

    def result(self, body: Put) -> PutResult:
        """Return this rank's counts, and its last read."""
        return PutResult(
            cp_size=body.cp_size,
            rounds=body.rounds,
            barrier=body.barrier,
            reads=self._reads,
            stale=self._stale,
            ahead=self._ahead,
            last_read=Array.of(np.array([self._row], dtype=np.int64)),
            offsets=(self._offset,),
            addresses=(self._mine.data_ptr(),),
            examples=tuple(self._examples),
        )
