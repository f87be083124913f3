"""Simulate a push while the ranks' free lists differ: no error occurs, and rows are misplaced.

A pool that allocates at the lowest free address returns the same offset on every rank only while
all ranks free the same blocks at the same time. Here each rank has its own arena and executes its
own trace. Then every rank pushes its shard into `recv` on all ranks, at the offset of its own
arena. No processes are involved. Reported as pytorch#178138 and sglang#34230.

    rank 0   alloc A, alloc B, free A, alloc recv → row 0
    rank 1   alloc A, alloc B,         alloc recv → row 8     (A is still in use)
    rank 0 pushes to row 0 of rank 1: it overwrites A, which rank 1 still reads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpkit.memory.allocator import ALIGNMENT_BYTES, FreeList

Ints = npt.NDArray[np.int64]
Action = tuple[str, str, int]  # ("alloc", block, rows) or ("free", block, 0)
Blocks = dict[str, tuple[int, int, int]]  # name to (which allocation, first row, rows)
ROW_BYTES = ALIGNMENT_BYTES
BEFORE, GATHER = 1, 2  # rounds: the contents before the push, and the pushed rows


@dataclass(frozen=True)
class Divergence:
    """The memory of every rank after the push, as decoded provenance, and its wrong rows.

    `memory[rank]` is int64 `[rows, 4]` of (round, rank, block, row), -1 where never written. Blocks
    are counted from 1 by their allocation; 0 is the gather.
    """

    memory: tuple[Ints, ...]
    recv: tuple[int, ...]  # first row of `recv`, by rank
    lost: tuple[Ints, ...]  # rows of `recv` that do not hold the rows sent to them, by rank
    overwritten: tuple[Ints, ...]  # rows of blocks in use that the push destroyed, by rank

    @property
    def diverged(self) -> bool:
        """Whether `recv` has different offsets on the ranks."""
        return len(set(self.recv)) > 1

    def explain(self) -> str:
        """Describe the offsets, and the first lost and the first overwritten row of each rank."""
        if not self.diverged:
            return f"recv is at row {self.recv[0]} on all ranks; every row is right"
        offsets = ", ".join(f"row {row} on rank {rank}" for rank, row in enumerate(self.recv))
        parts = [f"recv is at {offsets}"]
        for rank, rows in enumerate(self.lost):
            if len(rows):
                parts.append(f"rank {rank}: row {rows[0]} of recv {self._contents(rank, rows[0])}")
        for rank, rows in enumerate(self.overwritten):
            if len(rows):
                round_, writer = self.memory[rank][rows[0]][:2]
                parts.append(
                    f"rank {rank}: row {rows[0]} of its arena was in use, and now holds "
                    f"round {round_} of rank {writer}"
                )
        return "; ".join(parts)

    def _contents(self, rank: int, row: int) -> str:
        round_, writer = self.memory[rank][row + self.recv[rank]][:2]
        return "was never written" if round_ < 0 else f"holds round {round_} of rank {writer}"


def simulate_push(
    traces: Sequence[Sequence[Action]], shard_rows: int, arena_rows: int
) -> Divergence:
    """Execute each rank's trace, allocate `recv`, and push every rank's shard into it.

    Raises ValueError when an arena has no room for a block.
    """
    size = len(traces)
    arenas, blocks = zip(*(_execute(trace, arena_rows) for trace in traces), strict=True)
    memory = [_stamped(blocks[rank], rank, arena_rows) for rank in range(size)]
    before = [rows.copy() for rows in memory]
    recv = [_allocate(arena, "recv", size * shard_rows) for arena in arenas]
    shards = np.array(
        [[(GATHER, writer, 0, row) for row in range(shard_rows)] for writer in range(size)]
    )
    for writer in range(size):
        first = recv[writer] + writer * shard_rows  # the writer uses its own offset on all peers
        for peer in range(size):
            memory[peer][first : first + shard_rows] = shards[writer]
    lost, overwritten = [], []
    for rank in range(size):
        got = memory[rank][recv[rank] :][: size * shard_rows]
        lost.append(np.flatnonzero((got != shards.reshape(-1, 4)).any(1)))
        in_use = np.zeros(arena_rows, dtype=bool)
        for _, first, count in blocks[rank].values():
            in_use[first : first + count] = True
        overwritten.append(np.flatnonzero(in_use & (memory[rank] != before[rank]).any(1)))
    return Divergence(tuple(memory), tuple(recv), tuple(lost), tuple(overwritten))


def _execute(trace: Sequence[Action], arena_rows: int) -> tuple[FreeList, Blocks]:
    """Return the arena after a trace, and the blocks that are still in use."""
    arena, blocks, number = FreeList(arena_rows * ROW_BYTES), Blocks(), 0
    for action, block, rows in trace:
        if action == "alloc":
            number += 1
            blocks[block] = number, _allocate(arena, block, rows), rows
        else:
            _, first, count = blocks.pop(block)
            arena.free(first * ROW_BYTES, count * ROW_BYTES)
    return arena, blocks


def _allocate(arena: FreeList, block: str, rows: int) -> int:
    offset = arena.allocate(rows * ROW_BYTES)
    if offset is None:
        raise ValueError(f"{block} of {rows} rows does not fit the arena of {arena.nbytes} bytes")
    return offset // ROW_BYTES


def _stamped(blocks: Blocks, rank: int, arena_rows: int) -> Ints:
    """Return a rank's memory `[arena_rows, 4]` with its blocks written in round BEFORE."""
    memory = np.full((arena_rows, 4), -1, dtype=np.int64)
    for number, first, rows in blocks.values():
        memory[first : first + rows] = [(BEFORE, rank, number, row) for row in range(rows)]
    return memory
