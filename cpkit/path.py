"""Which path a gather takes, decided from where every rank's buffers are. Pure.

Ranks that push into peers' memory need one thing: the *receive* buffer in the group's pool, at one
offset on all ranks. Where only the *send* buffer is there, peers can pull from it. This is the rule
of the POSIX backend; NCCL's own rule is a table of versions.

| path | what happens |
|---|---|
| `symmetric` | each rank stores its rows into every peer's receive buffer |
| `staged` | each rank loads the rows it needs out of every peer's symmetric send buffer |
| `fallback` | the collective of torch.distributed; no symmetric memory is involved |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

PathName = Literal["symmetric", "staged", "fallback"]


class Where(msgspec.Struct, frozen=True):
    """Where a buffer is: its segment and offset in the pool, or why it has none (`other`)."""

    segment: int = -1
    offset: int = -1
    other: str = ""

    def __str__(self) -> str:
        return self.other or f"in the pool: segment {self.segment}, offset {self.offset}"


class Place(msgspec.Struct, frozen=True):
    """Where one rank's two buffers are."""

    send: Where
    recv: Where


@dataclass(frozen=True)
class PathReport:
    """What a gather really does, why, and where this rank's buffers are."""

    path: PathName
    reason: str
    send: str
    recv: str


def decide(places: list[Place], rank: int) -> PathReport:
    """The path for buffers placed like this, as `rank` reports it; the same path on every rank."""
    recv_fault = _fault("recv", [place.recv for place in places])
    send_fault = _fault("send", [place.send for place in places])
    path: PathName
    if not recv_fault:
        path = "symmetric"
        reason = "recv is symmetric on all ranks"
        reason += f"; {send_fault}, which costs nothing here" if send_fault else ", and so is send"
    elif not send_fault:
        path, reason = "staged", f"{recv_fault}; peers pull from the symmetric send buffers"
    else:
        path, reason = "fallback", f"{recv_fault}; {send_fault}"
    mine = places[rank]
    return PathReport(path, reason, str(mine.send), str(mine.recv))


def _fault(name: str, where: list[Where]) -> str:
    """Why these buffers are not symmetric; empty when they are."""
    for rank, place in enumerate(where):
        if place.other:
            return f"{name} of rank {rank} is {place.other}"
    offsets = [(place.segment, place.offset) for place in where]
    if len(set(offsets)) > 1:
        said = ", ".join(f"rank {r}: {s}/{o}" for r, (s, o) in enumerate(offsets))
        return f"{name} stands at different segment/offset on the ranks ({said})"
    return ""
