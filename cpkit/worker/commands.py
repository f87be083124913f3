"""Commands from rank 0 to all ranks, and their answers, through the job's key-value store.

    rank 0   send(command) ─▶ store ─▶ every rank executes it ─ answer ─▶ store ─▶ rank 0

Unlike a collective, the store can tell which ranks have not answered. Commands are also never mixed
with measured traffic. A message has at most 8 MiB, torch's limit of a value; the limits of requests
keep commands and results below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import timedelta

import msgspec
import torch.distributed as dist

from cpkit.control.messages import Body, Message
from cpkit.packing import describe_types
from cpkit.settings import deadline_s

_TIMEOUT = timedelta(minutes=10)  # between two commands
_LONGEST_PAUSE_S = 0.05
_PREFIX, _TIMED_OUT = "cpkit/commands", "timed_out"
_MARGIN_S = 1.0  # between the answers of ranks that waited for the same rank
KEEP_ALIVE_S = 60.0  # interval of KeepAlive on an idle rank 0; far shorter than the timeout


class Begin(Message, frozen=True, tag="begin"):
    """Start a job of a client, and run its first step."""

    job: int
    body: Body
    client: bytes


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
    timed_out: bool = False  # a wait for another rank ended at its deadline


class CommandChannel:
    """One rank's end of the channel."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = dist.PrefixStore(_PREFIX, store)
        self.rank, self.size = rank, size
        self._number = 0  # of the last command
        self._sent_s = time.monotonic()
        self._has_answered = True

    def send(self, command: Command) -> None:
        """On rank 0, send a command to all ranks."""
        self._number += 1
        self._sent_s, self._has_answered = time.monotonic(), False
        self._set(f"{self._number}", command)

    def receive(self) -> Command:
        """On the other ranks, wait for the next command and return it."""
        self._number += 1
        key = f"{self._number}"
        self._store.wait([key], _TIMEOUT)
        return msgspec.msgpack.decode(self._store.get(key), type=Command)  # type: ignore[no-any-return]

    def answer(self, result: StepResult) -> None:
        """Answer the last command. Every rank answers every command."""
        if result.timed_out:
            self._store.set(f"{self._number}/{_TIMED_OUT}", "1")
        self._set(self._key(self.rank), result)
        self._has_answered = True

    def overdue_s(self, store: dist.Store) -> float:
        """Return the age of a command for whose step another rank has waited for rank 0 in vain.

        Return 0 when rank 0 has answered, or no rank has timed out. For another thread of rank 0,
        with its own connection to the job's store.
        """
        has_timed_out = dist.PrefixStore(_PREFIX, store).check([f"{self._number}/{_TIMED_OUT}"])
        is_late = has_timed_out and not self._has_answered
        return time.monotonic() - self._sent_s if is_late else 0.0

    def answers(self, report_late: Callable[[list[int], float], None]) -> list[StepResult]:
        """On rank 0, wait for the answers of all ranks to the last command; return them by rank.

        When no answer has arrived for `deadline_s()`, call `report_late` repeatedly with the
        late ranks and the seconds since the command was sent. Late answers are returned too. After
        an answer that says that its rank waited in vain, only a second is left to the other ranks.
        After another failure they have a second more, because they may wait for that rank until
        their own deadline.
        """
        results: dict[int, StepResult] = {}
        progress_s = time.monotonic()
        while late := [rank for rank in range(self.size) if rank not in results]:
            arrived = [rank for rank in late if self._store.check([self._key(rank)])]
            for rank in arrived:
                answer = self._store.get(self._key(rank))
                results[rank] = msgspec.msgpack.decode(answer, type=StepResult)
            now_s = time.monotonic()
            if arrived:
                progress_s = now_s
            elif now_s - progress_s >= _patience_s(results.values()):
                report_late(late, now_s - self._sent_s)
            # Poll, because a wait that times out writes two lines to the log.
            time.sleep(min((now_s - progress_s) / 10, _LONGEST_PAUSE_S))
        for key in (f"{self._number}", *map(self._key, range(self.size))):
            self._store.delete_key(key)  # every rank has read the command
        if any(result.timed_out for result in results.values()):
            self._store.delete_key(f"{self._number}/{_TIMED_OUT}")
        return [results[rank] for rank in range(self.size)]

    def _key(self, rank: int) -> str:
        return f"{self._number}/{rank}"

    def _set(self, key: str, message: Message) -> None:
        self._store.set(key, msgspec.msgpack.encode(message))  # type: ignore[arg-type] # bytes are fine


def _patience_s(answered: Collection[StepResult]) -> float:
    """Return how long the next answer may take."""
    if any(result.timed_out for result in answered):
        return min(deadline_s(), _MARGIN_S)
    has_failed = any(result.error and not result.agreed for result in answered)
    return deadline_s() + (_MARGIN_S if has_failed else 0.0)


describe_types(Command, StepResult)
