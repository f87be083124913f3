"""How rank 0 tells the other ranks what to do, and hears how it went: two small collectives.

    rank 0   give(order) ─ broadcast ─▶ everybody acts ─ gather ─▶ [outcome of rank 0, of rank 1 …]

They go through a process group of their own, so that orders never mix with what is measured. A
frame has a fixed size; only what does not fit costs a second collective.
"""

from __future__ import annotations

from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from cpkit.control.messages import Body, Message

_FRAME_BYTES = 2048
_HEAD_BYTES = 8
_TIMEOUT = timedelta(minutes=10)  # between two orders; rank 0 ticks far more often
TICK_S = 60.0


class Begin(Message, frozen=True, tag="begin"):
    """Start a job, and take its first step."""

    job: int
    body: Body


class Step(Message, frozen=True, tag="step"):
    """Take the next step of a job."""

    job: int


class End(Message, frozen=True, tag="end"):
    """Drop these jobs; `reset`: also all groups, because somebody failed inside a collective."""

    jobs: tuple[int, ...]
    reset: bool = False


class Tick(Message, frozen=True, tag="tick"):
    """Nothing to do, for so long that somebody might think that rank 0 is gone."""


class Leave(Message, frozen=True, tag="leave"):
    """The end."""


Command = Begin | Step | End | Tick | Leave


class StepResult(Message, frozen=True):
    """How a step went on one rank. `report` is packed, empty on a rank that takes no part."""

    report: bytes = b""
    last: bool = False
    error: str = ""
    agreed: bool = False  # an error that every rank raises before anybody enters a collective
    bad_request: bool = False


class CommandChannel:
    """This rank's end. Making one is collective over the world."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def give(self, order: Command) -> None:
        """On rank 0: tell all other ranks."""
        self._broadcast(msgspec.msgpack.encode(order))

    def receive(self) -> Command:
        """On the other ranks: wait for an order."""
        return msgspec.msgpack.decode(self._broadcast(b""), type=Command)  # type: ignore[no-any-return]

    def gather(self, outcome: StepResult) -> list[StepResult]:
        """Everybody's outcome, by rank. Collective."""
        answers = self.gather_bytes(msgspec.msgpack.encode(outcome))
        return [msgspec.msgpack.decode(answer, type=StepResult) for answer in answers]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, by rank. Collective."""
        frames = self._gather_frames(_framed(data, _FRAME_BYTES))
        longest = max(map(_length, frames))
        if longest > _FRAME_BYTES - _HEAD_BYTES:
            frames = self._gather_frames(_framed(data, longest + _HEAD_BYTES))
        return [_content(frame) for frame in frames]

    def _gather_frames(self, frame: torch.Tensor) -> list[torch.Tensor]:
        frames = [torch.empty_like(frame) for _ in range(self.size)]
        dist.all_gather(frames, frame, group=self._group)
        return frames

    def _broadcast(self, data: bytes) -> bytes:
        frame = _framed(data, _FRAME_BYTES)
        dist.broadcast(frame, 0, group=self._group)
        length = _length(frame)
        if length > _FRAME_BYTES - _HEAD_BYTES:
            frame = _framed(data, length + _HEAD_BYTES)
            dist.broadcast(frame, 0, group=self._group)
        return _content(frame)


def _framed(data: bytes, nbytes: int) -> torch.Tensor:
    """Length and content in `nbytes`; the content is cut off where it does not fit."""
    frame = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
    whole = len(data).to_bytes(_HEAD_BYTES, "little") + data
    shown = bytearray(whole[:nbytes])
    frame[: len(shown)] = torch.frombuffer(shown, dtype=torch.uint8)
    return frame


def _length(frame: torch.Tensor) -> int:
    return int.from_bytes(frame[:_HEAD_BYTES].numpy().tobytes(), "little")


def _content(frame: torch.Tensor) -> bytes:
    return bytes(frame[_HEAD_BYTES : _HEAD_BYTES + _length(frame)].numpy().tobytes())
