"""What happens when the ranks' free lists differ: nothing fails, and rows land in the wrong place.

A pool that puts a block at the lowest free address gives the same offset everywhere only while all
ranks free the same blocks at the same time. Here each rank has an arena of its own and plays a
trace of its own; then all push a gather into `recv`, each to the offset that it knows from itself.
Pure: no processes. Source of the idea: pytorch#178138, sglang#34230.

    rank 0   alloc A, alloc B, free A, alloc recv → row 0
    rank 1   alloc A, alloc B,         alloc recv → row 8     (A is still in use)
    rank 0 pushes to row 0 of rank 1: over A, which rank 1 still reads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpkit.memory.allocator import ALIGNMENT_BYTES, Arena

Ints = npt.NDArray[np.int64]
Action = tuple[str, str, int]  # ("alloc", block, rows) or ("free", block, 0)
ROW_BYTES = ALIGNMENT_BYTES
BEFORE, GATHER = 1, 2  # rounds: what stood there before, and the gather that is pushed


@dataclass(frozen=True)
class Divergence:
    """The memory of every rank after the push, as decoded provenance, and where it went wrong.

    `memory[rank]` is int64 `[rows, 4]` of (round, rank, block or 0, row), -1 where nobody wrote.
    """

    memory: tuple[Ints, ...]
    recv: tuple[int, ...]  # first row of `recv`, by rank
    lost: tuple[Ints, ...]  # rows of `recv` that do not hold what was sent to them, by rank
    overwritten: tuple[Ints, ...]  # rows of blocks in use that the push destroyed, by rank

    @property
    def diverged(self) -> bool:
        """Whether `recv` stands at different offsets."""
        return len(set(self.recv)) > 1

    def explain(self) -> str:
        """In words, the first wrong row of every kind; what a checker would say."""
        if not self.diverged:
            return f"recv is at row {self.recv[0]} on all ranks; every row is right"
        places = ", ".join(f"rank {rank}: row {row}" for rank, row in enumerate(self.recv))
        said = [f"recv is at {places}"]
        for rank, rows in enumerate(self.lost):
            if len(rows):
                said.append(f"rank {rank}: row {rows[0]} of recv {self._holds(rank, rows[0])}")
        for rank, rows in enumerate(self.overwritten):
            if len(rows):
                round_, writer = self.memory[rank][rows[0]][:2]
                said.append(
                    f"rank {rank}: row {rows[0]} was in use, and holds round {round_} of rank "
                    f"{writer} now"
                )
        return "; ".join(said)

    def _holds(self, rank: int, row: int) -> str:
        round_, writer = self.memory[rank][row + self.recv[rank]][:2]
        return "was never written" if round_ < 0 else f"holds round {round_} of rank {writer}"


def push_into(traces: Sequence[Sequence[Action]], shard_rows: int, arena_rows: int) -> Divergence:
    """Play each rank's trace, allocate `recv`, and push every rank's shard into it.

    Raises ValueError when an arena has no room for a block.
    """
    size = len(traces)
    books = [_play(trace, arena_rows) for trace in traces]
    memory = [_before(blocks, rank, arena_rows) for rank, (_, blocks) in enumerate(books)]
    recv = [_place(arena, "recv", size * shard_rows) for arena, _ in books]
    kept = [rows.copy() for rows in memory]
    for writer in range(size):
        first = recv[writer] + writer * shard_rows  # the offset that the writer knows: its own
        for peer in range(size):
            memory[peer][first : first + shard_rows] = [
                (GATHER, writer, 0, row) for row in range(shard_rows)
            ]
    lost = [_lost(rows, first, size, shard_rows) for rows, first in zip(memory, recv, strict=True)]
    in_use = [_rows_of(blocks) for _, blocks in books]
    gone = [
        rows[(memory[rank][rows] != kept[rank][rows]).any(1)] for rank, rows in enumerate(in_use)
    ]
    return Divergence(tuple(memory), tuple(recv), tuple(lost), tuple(gone))


def _play(trace: Sequence[Action], arena_rows: int) -> tuple[Arena, dict[str, tuple[int, int]]]:
    """The arena after a trace, and the blocks still in use as (first row, rows)."""
    arena, blocks = Arena(arena_rows * ROW_BYTES), dict[str, tuple[int, int]]()
    for action, block, rows in trace:
        if action == "alloc":
            blocks[block] = _place(arena, block, rows), rows
        else:
            first, count = blocks.pop(block)
            arena.free(first * ROW_BYTES, count * ROW_BYTES)
    return arena, blocks


def _place(arena: Arena, block: str, rows: int) -> int:
    offset = arena.allocate(rows * ROW_BYTES)
    if offset is None:
        raise ValueError(f"{block} of {rows} rows does not fit the arena of {arena.nbytes} bytes")
    return offset // ROW_BYTES


def _before(blocks: dict[str, tuple[int, int]], rank: int, arena_rows: int) -> Ints:
    memory = np.full((arena_rows, 4), -1, dtype=np.int64)
    for number, (first, rows) in enumerate(blocks.values(), start=1):
        memory[first : first + rows] = [(BEFORE, rank, number, row) for row in range(rows)]
    return memory


def _lost(memory: Ints, first: int, size: int, shard_rows: int) -> Ints:
    want = [(GATHER, writer, 0, row) for writer in range(size) for row in range(shard_rows)]
    got = memory[first : first + size * shard_rows]
    return np.flatnonzero((got != np.array(want)).any(1))


def _rows_of(blocks: dict[str, tuple[int, int]]) -> Ints:
    rows = [np.arange(first, first + count) for first, count in blocks.values()]
    return np.concatenate([np.array([], dtype=np.int64), *rows]).astype(np.int64)
