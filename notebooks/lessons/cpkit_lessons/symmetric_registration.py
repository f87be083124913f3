"""Notebook 2, exercises 1 and 6: a peer's pointer, and what counts as registered."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from cpkit.memory.path import BufferLocation, BufferPair, Version, decide, nccl_rule
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.symmetric_questions import LESSON

Pointer = Callable[[int, int, int, Sequence[int]], int]
Registered = tuple[str, int] | None  # (group, offset), or None for ordinary memory
FastPath = Callable[[Version, str, list[Registered], list[Registered]], bool]
VERSIONS: tuple[Version, ...] = (
    (2, 26, 5),
    (2, 27, 3),
    (2, 28, 9),
    (2, 29, 1),
    (2, 29, 2),
    (2, 29, 7),
    (2, 30, 7),
)
_TORCH = {(2, 27, 5): "2.10", (2, 28, 9): "2.11", (2, 29, 7): "2.12.1, 2.13", (2, 30, 7): "2.14.1"}


@LESSON.exercise("e1", "a peer's pointer")
def check_peer_pointer(peer_pointer: Pointer) -> Score:
    """Random segments of up to 8 ranks, every pair of ranks."""
    draw, cases = random.Random(5), 0
    for size in (1, 2, 4, 8):
        bases = [draw.randrange(1 << 20, 1 << 46, 4096) for _ in range(size)]
        for me, peer in itertools.product(range(size), repeat=2):
            offset = draw.randrange(0, 1 << 20, 256)
            got = peer_pointer(bases[me] + offset, me, peer, list(bases))
            if got != bases[peer] + offset:
                place = _in_words(got, bases)
                raise Wrong(
                    f"peer_pointer({bases[me] + offset:#x}, me={me}, peer={peer}, {size} bases) is "
                    f"{got:#x}, {place}; wanted offset {offset} of rank {peer}, "
                    f"{bases[peer] + offset:#x}"
                    if isinstance(got, int)
                    else f"peer_pointer returned {got!r}; a pointer is an int"
                )
            cases += 1
    return Score(cases)


def _in_words(pointer: object, bases: Sequence[int]) -> str:
    if not isinstance(pointer, int):
        return ""
    owner = next((r for r, base in enumerate(bases) if 0 <= pointer - base < 1 << 20), None)
    if owner is None:
        return "which no rank has mapped"
    return f"offset {pointer - bases[owner]} of rank {owner}"


@LESSON.exercise("e6", "the fast path's rule")
def check_fast_path(fast_path: FastPath) -> Score:
    """Every pair of buffers, for seven versions of NCCL, compared with cpkit.memory.path."""
    cases = 0
    for version, (send_name, send), (recv_name, recv) in itertools.product(
        VERSIONS, _buffers(), _buffers()
    ):
        got = fast_path(version, "attn_cp", list(send), list(recv))
        places = [BufferPair(_where(s), _where(r)) for s, r in zip(send, recv, strict=True)]
        report = decide(places, 0, f"nccl {'.'.join(map(str, version))}")
        if bool(got) != (report.path == "symmetric"):
            raise Wrong(
                f"NCCL {'.'.join(map(str, version))}, send {send_name}, recv {recv_name}: you say "
                f"{bool(got)}; wanted {report.path == 'symmetric'} ({report.reason})"
            )
        cases += 1
    return Score(cases)


def _buffers() -> Iterator[tuple[str, list[Registered]]]:
    good: list[Registered] = [("attn_cp", 4096)] * 3
    yield "registered", good
    yield "ordinary", [None] * 3
    yield "ordinary on rank 2", [*good[:2], None]
    yield "of group tp", [("tp", 4096)] * 3
    yield "of group tp on rank 1", [good[0], ("tp", 4096), good[2]]
    yield "at another offset on rank 2", [*good[:2], ("attn_cp", 8192)]


def _where(place: Registered) -> BufferLocation:
    if place is None:
        return BufferLocation(other="ordinary memory", fault="unregistered")
    group, offset = place
    if group != "attn_cp":
        return BufferLocation(other=f"registered with group {group}", fault="foreign")
    return BufferLocation(0, offset)


def version_table() -> pd.DataFrame:
    """What an all-gather needs, by NCCL version, from cpkit.memory.path.NCCL_RULES."""
    words = {"none": "no symmetric kernels", "both": "send and recv", "recv": "recv"}
    rows = [
        {
            "NCCL": ".".join(map(str, version)),
            "comes with torch": torch,
            "must be registered": words[nccl_rule(version)],
        }
        for version, torch in _TORCH.items()
    ]
    return pd.DataFrame(rows).set_index("NCCL")
