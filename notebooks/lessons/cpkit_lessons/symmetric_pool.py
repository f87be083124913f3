"""Notebook 2, exercise 5: when may a block be used again?"""

from __future__ import annotations

import random
from collections.abc import Callable

from cpkit.memory.allocator import Arena
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.symmetric_questions import LESSON

MayFree = Callable[[list[set[int]], int], set[int]]
_ARENA_BYTES = 1 << 20
_MEETINGS = 40


@LESSON.exercise("e5", "when is a block free?")
def check_may_free(may_free: MayFree) -> Score:
    """Pools of 1 to 4 ranks that let go of blocks at different times, 20 random lives each."""
    cases = peak = reference = 0
    for size in (1, 2, 3, 4):
        for seed in range(20):
            peak += _life(may_free, size, seed)
            reference += _life(_by_all, size, seed)
            cases += 1
    return Score(cases, {"peak KiB, sum": (peak >> 10, reference >> 10)})


def _by_all(dropped: list[set[int]], _me: int) -> set[int]:
    return set.intersection(*dropped)


def _life(may_free: MayFree, size: int, seed: int) -> int:
    """Allocate, let go and meet; the peak in bytes. Raises Wrong at the first divergence."""
    draw = random.Random(seed)
    arenas = [Arena(_ARENA_BYTES) for _ in range(size)]
    blocks: list[dict[int, tuple[int, int]]] = [{} for _ in range(size)]  # (offset, bytes)
    dropped: list[set[int]] = [set() for _ in range(size)]
    peak = 0
    for meeting in range(1, _MEETINGS + 1):
        nbytes = draw.choice((1, 2, 3, 8)) << 10
        offsets = [arena.allocate(nbytes) for arena in arenas]
        _must_agree(offsets, meeting, size)
        for mine, offset in zip(blocks, offsets, strict=True):
            mine[meeting] = offset or 0, nbytes
        for block in list(blocks[0]):
            for rank in range(size):
                if draw.random() < 0.35:  # each rank lets go in its own time
                    dropped[rank].add(block)
        told = [may_free([set(d) for d in dropped], rank) for rank in range(size)]
        for rank, free in enumerate(told):
            _must_be_a_set(free)
            _must_be_unused(free, rank, blocks[rank], dropped, meeting)
            for block in sorted(free):
                arenas[rank].free(*blocks[rank].pop(block))
        kept = sorted(set.intersection(*dropped) - told[0])
        if kept:
            raise Wrong(
                f"meeting {meeting}: all have let go of block {kept[0]}, and it was not freed: "
                f"the arena would fill up and spill"
            )
        freed = set.union(*told)
        dropped = [d - freed for d in dropped]
        peak = max(peak, *(arena.used_bytes for arena in arenas))
    return peak


def _must_agree(offsets: list[int | None], meeting: int, size: int) -> None:
    if None in offsets:
        raise Wrong(
            f"{size} ranks, before meeting {meeting}: the arena is full; blocks that all ranks "
            f"have let go of were not freed"
        )
    if len(set(offsets)) > 1:
        said = ", ".join(f"offset {offset} on rank {rank}" for rank, offset in enumerate(offsets))
        raise Wrong(
            f"{size} ranks: block {meeting} lies at {said}. The ranks have freed different blocks, "
            f"and a peer's row would land in the wrong place"
        )


def _must_be_a_set(free: object) -> None:
    if not isinstance(free, set):
        raise Wrong(f"may_free returned {free!r:.60}; wanted a set of blocks")


def _must_be_unused(
    free: set[int],
    rank: int,
    blocks: dict[int, tuple[int, int]],
    dropped: list[set[int]],
    meeting: int,
) -> None:
    unknown = free - blocks.keys()
    if unknown:
        raise Wrong(
            f"meeting {meeting}: rank {rank} frees {sorted(unknown)}; no such block is placed"
        )
    for user, theirs in enumerate(dropped):
        used = sorted(free - theirs)
        if used:
            raise Wrong(
                f"meeting {meeting}: rank {rank} frees block {used[0]}, and rank {user} still uses "
                f"it: the next gather would overwrite what rank {user} reads"
            )
