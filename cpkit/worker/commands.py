"""Commands from rank 0 to all ranks, and the results of each step: two small collectives.

    rank 0   send(command) ─ broadcast ─▶ every rank executes ─ all_gather ─▶ [StepResult per rank]

They use their own process group, so that commands are never mixed with measured traffic. A frame
has a fixed size; only a message that does not fit costs a second collective.
"""

from __future__ import annotations

from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from cpkit.control.messages import Body, Message

_FRAME_BYTES = 2048
_HEADER_BYTES = 8
_TIMEOUT = timedelta(minutes=10)  # between two commands
KEEP_ALIVE_S = 60.0  # interval of KeepAlive on an idle rank 0; far shorter than the timeout


class Begin(Message, frozen=True, tag="begin"):
    """Start a job, and run its first step."""

    job: int
    body: Body


class Step(Message, frozen=True, tag="step"):
    """Run the next step of a job."""

    job: int


class End(Message, frozen=True, tag="end"):
    """Drop these jobs. `reset` also drops all groups, after a failure inside a collective."""

    jobs: tuple[int, ...]
    reset: bool = False


class KeepAlive(Message, frozen=True, tag="keep_alive"):
    """Do nothing, but renew the timeout while no request arrives."""


class Exit(Message, frozen=True, tag="exit"):
    """Leave the command loop; the process then exits."""


Command = Begin | Step | End | KeepAlive | Exit


class StepResult(Message, frozen=True):
    """The result of a step on one rank. `report` is packed, and empty outside the first group."""

    report: bytes = b""
    last: bool = False
    error: str = ""
    agreed: bool = False  # every rank raised this error before any of them entered a collective
    bad_request: bool = False


class CommandChannel:
    """One rank's end of the channel. The constructor is collective over the world."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def send(self, command: Command) -> None:
        """On rank 0, send a command to all other ranks."""
        self._broadcast(msgspec.msgpack.encode(command))

    def receive(self) -> Command:
        """On the other ranks, wait for the next command and return it."""
        return msgspec.msgpack.decode(self._broadcast(b""), type=Command)  # type: ignore[no-any-return]

    def all_gather(self, result: StepResult) -> list[StepResult]:
        """Return the result of every rank, by rank. Collective."""
        packed = self.all_gather_bytes(msgspec.msgpack.encode(result))
        return [msgspec.msgpack.decode(data, type=StepResult) for data in packed]

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes of every rank, by rank; the lengths may differ. Collective."""
        frames = self._gather_frames(_frame(data, _FRAME_BYTES))
        longest = max(map(_length, frames))
        if longest > _FRAME_BYTES - _HEADER_BYTES:
            frames = self._gather_frames(_frame(data, longest + _HEADER_BYTES))
        return [_content(frame) for frame in frames]

    def _gather_frames(self, frame: torch.Tensor) -> list[torch.Tensor]:
        frames = [torch.empty_like(frame) for _ in range(self.size)]
        dist.all_gather(frames, frame, group=self._group)
        return frames

    def _broadcast(self, data: bytes) -> bytes:
        frame = _frame(data, _FRAME_BYTES)
        dist.broadcast(frame, 0, group=self._group)
        length = _length(frame)
        if length > _FRAME_BYTES - _HEADER_BYTES:
            frame = _frame(data, length + _HEADER_BYTES)
            dist.broadcast(frame, 0, group=self._group)
        return _content(frame)


def _frame(data: bytes, nbytes: int) -> torch.Tensor:
    """Return a frame of `nbytes`: length and content. Content that does not fit is cut off."""
    frame = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
    message = len(data).to_bytes(_HEADER_BYTES, "little") + data
    fitting = bytearray(message[:nbytes])
    frame[: len(fitting)] = torch.frombuffer(fitting, dtype=torch.uint8)
    return frame


def _length(frame: torch.Tensor) -> int:
    return int.from_bytes(frame[:_HEADER_BYTES].numpy().tobytes(), "little")


def _content(frame: torch.Tensor) -> bytes:
    return bytes(frame[_HEADER_BYTES : _HEADER_BYTES + _length(frame)].numpy().tobytes())
