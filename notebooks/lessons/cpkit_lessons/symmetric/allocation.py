"""Notebook 2, exercises 1 and 5 to 7: pointers, free blocks, registration, causes of failures."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec
import pandas as pd

from cpkit.memory.allocator import FreeList
from cpkit.memory.path import (
    BufferLocation,
    BufferPair,
    Version,
    decide,
    nccl_is_racy,
    nccl_rule,
)
from cpkit_lessons import guard
from cpkit_lessons.failure_lab import CASES, PostMortem, RankReport
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.symmetric.questions import LESSON

Pointer = Callable[[int, int, int, Sequence[int]], int]
MayFree = Callable[[list[set[int]], int], set[int]]
Registered = tuple[str, int] | None  # (group, offset), or None for ordinary memory
FastPath = Callable[[Version, str, list[Registered], list[Registered]], str]
Cause = Callable[[list[RankReport]], str]


# ------------------------------------------------------------------------ 1: a peer's pointer


@LESSON.exercise("e1", "a peer's pointer")
def check_peer_pointer(peer_pointer: Pointer) -> Score:
    """Check the example, then random segments of up to 8 ranks, for every pair of ranks."""
    draw = random.Random(5)
    asked = [(1064, 0, 1, [1000, 5000])]
    for size in (1, 2, 4, 8):
        bases = [draw.randrange(1 << 20, 1 << 46, 4096) for _ in range(size)]
        for me, peer in itertools.product(range(size), repeat=2):
            asked.append((bases[me] + draw.randrange(0, 1 << 20, 256), me, peer, bases))
    for pointer, me, peer, bases in asked:
        got = peer_pointer(pointer, me, peer, list(bases))
        if not isinstance(got, int):
            raise WrongAnswer(f"peer_pointer returned {got!r}; a pointer is an int")
        offset = pointer - bases[me]
        if got != bases[peer] + offset:
            raise WrongAnswer(
                f"peer_pointer({pointer}, {me}, {peer}, {bases}) is {got}, {_locate(got, bases)}; "
                f"expected offset {offset} of rank {peer}, {bases[peer] + offset}"
            )
    return Score(len(asked))


def _locate(pointer: int, bases: Sequence[int]) -> str:
    below = [rank for rank, base in enumerate(bases) if 0 <= pointer - base < 1 << 20]
    if not below:
        return "which is in no segment"
    owner = max(below, key=lambda rank: bases[rank])
    return f"offset {pointer - bases[owner]} of rank {owner}"


# ------------------------------------------------------------------- 5: when is a block free?

_ARENA_BYTES = 1 << 20
_EXCHANGES = 40


@LESSON.exercise("e5", "the blocks that are free")
def check_may_free(may_free: MayFree) -> Score:
    """Simulate pools of 1 to 4 ranks that release blocks at different times, 20 times each."""
    cases = peak = reference = 0
    for size in (1, 2, 3, 4):
        for seed in range(20):
            peak += _peak_bytes(may_free, size, seed)
            reference += _peak_bytes(_released_by_all, size, seed)
            cases += 1
    return Score(cases, {"peak memory in KiB, all cases added": (peak >> 10, reference >> 10)})


def _released_by_all(released: list[set[int]], _me: int) -> set[int]:
    return set.intersection(*released)


def _peak_bytes(may_free: MayFree, size: int, seed: int) -> int:
    """Allocate, release and exchange; return the peak. Raises WrongAnswer at the first mistake."""
    draw = random.Random(seed)
    arenas = [FreeList(_ARENA_BYTES) for _ in range(size)]
    blocks: list[dict[int, tuple[int, int]]] = [{} for _ in range(size)]  # (offset, bytes)
    released: list[set[int]] = [set() for _ in range(size)]
    peak = 0
    for number in range(1, _EXCHANGES + 1):
        nbytes = draw.choice((1, 2, 3, 8)) << 10
        offsets = [arena.allocate(nbytes) for arena in arenas]
        _check_offsets(offsets, number)
        for mine, offset in zip(blocks, offsets, strict=True):
            mine[number] = offset or 0, nbytes
        for block in list(blocks[0]):
            for rank in range(size):
                if draw.random() < 0.35:  # the ranks release a block at different times
                    released[rank].add(block)
        freed = [_asked(may_free, released, rank) for rank in range(size)]
        for rank, free in enumerate(freed):
            _check_unused(free, rank, blocks[rank], released, number)
            for block in sorted(free):
                arenas[rank].free(*blocks[rank].pop(block))
        kept = sorted(set.intersection(*released) - freed[0])
        if kept:
            raise WrongAnswer(
                f"exchange {number}: all ranks have released block {kept[0]}, but it was not "
                f"freed: the arena would fill up, and later blocks would spill"
            )
        freed_by_any = set().union(*freed)
        released = [each - freed_by_any for each in released]
        peak = max(peak, *(arena.used_bytes for arena in arenas))
    return peak


def _asked(may_free: MayFree, released: list[set[int]], rank: int) -> set[int]:
    given = [set(each) for each in released]
    free = may_free(given, rank)
    if given != released:
        raise WrongAnswer(
            f"rank {rank} of {len(released)}: your function changed its argument, which holds what "
            f"the ranks have released; return a new set"
        )
    return free


def _check_offsets(offsets: list[int | None], number: int) -> None:
    size = len(offsets)
    if None in offsets:
        raise WrongAnswer(
            f"{size} ranks, before exchange {number}: the arena is full; blocks that all ranks "
            f"have released were not freed"
        )
    if len(set(offsets)) > 1:
        each = ", ".join(f"offset {offset} on rank {rank}" for rank, offset in enumerate(offsets))
        raise WrongAnswer(
            f"{size} ranks: block {number} has {each}. The ranks have freed different blocks, "
            f"so a peer's row would be written to the wrong offset"
        )


def _check_unused(
    free: AbstractSet[int],
    rank: int,
    blocks: dict[int, tuple[int, int]],
    released: list[set[int]],
    number: int,
) -> None:
    if not isinstance(free, AbstractSet):
        raise WrongAnswer(f"may_free returned {free!r:.60}; expected a set of blocks")
    if unknown := free - blocks.keys():
        raise WrongAnswer(
            f"exchange {number}: rank {rank} frees {sorted(unknown)}; no such block is allocated"
        )
    for user, theirs in enumerate(released):
        if used := sorted(free - theirs):
            raise WrongAnswer(
                f"exchange {number}: rank {rank} frees block {used[0]}, and rank {user} still uses "
                f"it: the next gather would overwrite what rank {user} reads"
            )


# -------------------------------------------------------------------- 6: the fast path's rule

_TORCH = {(2, 27, 5): "2.10", (2, 28, 9): "2.11", (2, 29, 7): "2.12.1, 2.13", (2, 30, 7): "2.14.1"}
_VERSIONS: tuple[Version, ...] = (
    (2, 26, 5),
    (2, 27, 3),
    (2, 28, 0),
    (2, 28, 9),
    (2, 29, 2),
    (2, 29, 7),
    (2, 30, 4),
    (2, 30, 7),
)
ANSWERS = ("fallback", "racy", "sound")


def version_table() -> pd.DataFrame:
    """Return what an all-gather needs registered, and the race, by the NCCL of each torch."""
    needs = {"none": "no symmetric kernels", "both": "send and recv", "recv": "recv"}
    rows = [
        {
            "NCCL": ".".join(map(str, version)),
            "comes with torch": torch,
            "must be registered": needs[nccl_rule(version)],
            "waits for the preceding kernel": "no" if nccl_is_racy(version) else "yes",
        }
        for version, torch in _TORCH.items()
    ]
    return pd.DataFrame(rows).set_index("NCCL")


@LESSON.exercise("e6", "the rule of the fast path")
def check_fast_path(fast_path: FastPath) -> Score:
    """Compare with cpkit.memory.path for every pair of buffers and eight versions of NCCL."""
    cases = 0
    for version, (send_name, send), (recv_name, recv) in itertools.product(
        _VERSIONS, _buffers(), _buffers()
    ):
        got = fast_path(version, "attn_cp", list(send), list(recv))
        where = f"NCCL {'.'.join(map(str, version))}, send {send_name}, recv {recv_name}"
        if not isinstance(got, str) or got not in ANSWERS:
            raise WrongAnswer(
                f"{where}: fast_path returned {got!r:.60}; it must be one of {', '.join(ANSWERS)}"
            )
        wanted, reason = wanted_path(version, send, recv)
        if got != wanted:
            raise WrongAnswer(f"{where}: you say {got!r}; expected {wanted!r} ({reason})")
        cases += 1
    return Score(cases)


def wanted_path(
    version: Version, send: Sequence[Registered], recv: Sequence[Registered]
) -> tuple[str, str]:
    """Return the right answer of exercise 6 for the group "attn_cp", and the reason."""
    pairs = [BufferPair(_location(s), _location(r)) for s, r in zip(send, recv, strict=True)]
    report = decide(pairs, 0, f"nccl {'.'.join(map(str, version))}")
    if report.path != "symmetric":
        return "fallback", report.reason
    return "racy" if nccl_is_racy(version) else "sound", report.reason


def _buffers() -> Iterator[tuple[str, list[Registered]]]:
    good: list[Registered] = [("attn_cp", 4096)] * 3
    yield "registered", good
    yield "ordinary", [None] * 3
    yield "ordinary on rank 2", [*good[:2], None]
    yield "of group tp", [("tp", 4096)] * 3
    yield "of group tp on rank 1", [good[0], ("tp", 4096), good[2]]
    yield "at another offset on rank 2", [*good[:2], ("attn_cp", 8192)]
    yield "at a different offset on each rank", [("attn_cp", 4096 + 1024 * r) for r in range(3)]


def _location(buffer: Registered) -> BufferLocation:
    if buffer is None:
        return BufferLocation(other="ordinary memory", fault="unregistered")
    group, offset = buffer
    if group != "attn_cp":
        return BufferLocation(other=f"registered with group {group}", fault="foreign")
    return BufferLocation(0, offset)


# --------------------------------------------------------------- 7: from post-mortem to cause


@LESSON.exercise("e7", "post-mortem to cause")
def check_cause(cause: Cause, cards: Mapping[str, PostMortem]) -> Score:
    """Check the post-mortems of the learner's own runs, in both orders of their ranks.

    Each is also checked with values that another run could have: another time and barrier number.
    """
    missing = [case for case in CASES if case not in cards]
    if missing:
        raise WrongAnswer(
            f"run the failure lab (section 9) first; there is no post-mortem yet for "
            f"{', '.join(missing)}"
        )
    cases = 0
    for case, card in cards.items():
        elsewhere = tuple(map(_in_another_run, card.ranks))
        for ranks in (card.ranks, card.ranks[::-1], elsewhere):
            got = cause(list(ranks))
            if not guard.equals(got, case):
                title = "With another barrier and time" if ranks is elsewhere else "Its post-mortem"
                report = dataclasses.replace(card, case=title, ranks=ranks)
                shown = str(report).replace("\n", "\n  ")
                raise WrongAnswer(f"you say {got!r:.60}; the cause was {case!r}. {shown}")
            cases += 1
    return Score(cases)


def _in_another_run(rank: RankReport) -> RankReport:
    """Return the report with a different barrier number, and a different time if no rank waited."""
    message = re.sub(r"at barrier \d+", "at barrier 7", rank.message)
    waited_s = rank.waited_s if rank.error == "BarrierTimeout" else 0.05
    return msgspec.structs.replace(rank, waited_s=waited_s, message=message)
