"""Every rank writes its stamp into every peer's memory, and reads what peers wrote into its own.

    round n, with barriers      write n everywhere │ barrier │ read: n everywhere │ barrier │ next
    round without                     write n everywhere, read: whatever is there by now, next round

A stamp is `writer << 32 | round`, so a read says who wrote it, and whether it is of an earlier
round (stale: the peer is not there yet) or a later one (ahead: it has overwritten what was to be
read).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cpkit.control.messages import Array, Message, Progress, Put, PutResult, ReplyBody
from cpkit.devices import default_device, finish
from cpkit.group import CPGroup
from cpkit.symm import symmetric_pool, use_symmetric_memory
from cpkit.worker.operation import Operation, RankState, Steps

_ROUNDS_A_STEP = 500
_MAX_EXAMPLES = 5
_ROUND_BITS = 32


class PutReport(Message, frozen=True):
    """What one rank read."""

    reads: int
    stale: int
    ahead: int
    row: tuple[int, ...]
    offset: int
    address: int
    examples: tuple[str, ...]


class PutOperation(Operation[Put, PutReport]):
    """As many rounds a step as keep it short."""

    report = PutReport

    def steps(self, group: CPGroup, state: RankState) -> Steps[PutReport]:
        """Reports count from the first round on."""
        with use_symmetric_memory(group):
            mine = torch.zeros(group.size, dtype=torch.int64, device=default_device())
        finish()
        group.barrier()
        board = _Stamps(mine, group, self.body.barrier)
        for first in range(1, self.body.rounds + 1, _ROUNDS_A_STEP):
            if first > 1:
                yield board.report()
            group.barrier()
            for number in range(first, min(first + _ROUNDS_A_STEP, self.body.rounds + 1)):
                board.play(number)
            group.barrier()
        return board.report()

    def collect(self, reports: list[PutReport], *, over: bool) -> Iterator[ReplyBody]:
        """The result; counts of all ranks together."""
        if not over:
            yield Progress(reports[0].reads // self.body.cp_size, self.body.rounds, "rounds")
            return
        yield PutResult(
            cp_size=self.body.cp_size,
            rounds=self.body.rounds,
            barrier=self.body.barrier,
            reads=sum(report.reads for report in reports),
            stale=sum(report.stale for report in reports),
            ahead=sum(report.ahead for report in reports),
            matrix=Array.of(np.array([report.row for report in reports], dtype=np.int64)),
            offsets=tuple(report.offset for report in reports),
            addresses=tuple(report.address for report in reports),
            examples=tuple(e for report in reports for e in report.examples)[:_MAX_EXAMPLES],
        )


class _Stamps:
    """One rank's memory, its view of the peers', and what it has read so far."""

    def __init__(self, mine: torch.Tensor, group: CPGroup, barrier: bool) -> None:
        pool = symmetric_pool(group, mine.device.type)
        place = pool.locate(mine)
        self._mine, self._group, self._barrier = mine, group, barrier
        self._views = [pool.peer_view(mine, peer) for peer in range(group.size)]
        # On the CPU, numpy stores a word at once; torch takes microseconds for it.
        self._words = [v.numpy() for v in self._views] if mine.device.type == "cpu" else self._views
        self._offset = place[1] if place else -1
        self._reads = self._stale = self._ahead = 0
        self._row: list[int] = []
        self._examples: list[str] = []

    def play(self, number: int) -> None:
        """Write to all peers, then read what they wrote here."""
        rank = self._group.rank
        for view in self._words:
            view[rank] = rank << _ROUND_BITS | number
        finish()
        if self._barrier:
            self._group.barrier()
        self._row = self._mine.tolist()
        if self._barrier:
            self._group.barrier()
        for writer, stamp in enumerate(self._row):
            self._judge(number, writer, stamp & ((1 << _ROUND_BITS) - 1))

    def _judge(self, number: int, writer: int, found: int) -> None:
        self._reads += 1
        self._stale += found < number
        self._ahead += found > number
        if found != number and len(self._examples) < _MAX_EXAMPLES:
            self._examples.append(
                f"round {number}: rank {self._group.rank} read round {found} of rank {writer}"
            )

    def report(self) -> PutReport:
        """All that was read since the first round."""
        return PutReport(
            reads=self._reads,
            stale=self._stale,
            ahead=self._ahead,
            row=tuple(self._row),
            offset=self._offset,
            address=self._mine.data_ptr(),
            examples=tuple(self._examples),
        )
