"""Small programs of several ranks over one shared memory, run one step at a time.

A program is a generator; each `yield` is one step that other ranks can see. Between two steps of a
rank the others may take as many as they like.

    def exchange(me):
        for number in me.rounds:
            for peer in me.everybody:
                yield me.put(peer, number)      # my stamp of this round, into my slot there
            yield me.barrier()
            for writer in me.everybody:
                yield me.read(writer, number)   # must hold the stamp of this very round
            yield me.barrier()

Memory here is sequentially consistent: a step is seen by all at once. Real memory is weaker, so a
program that fails here fails everywhere, and one that passes still needs the fences of its barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

MAX_STEPS = 400  # of one rank: more is a program that does not end
NOBODY = 0  # the round of a slot that nobody has written yet


@dataclass(frozen=True)
class Step:
    """One step of a rank; made by the methods of `Rank`."""

    kind: str
    peer: int = -1
    round: int = 0
    channel: str = ""
    data: Any = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        words = {
            "put": f"put → {self.peer}",
            "read": f"read slot {self.peer}",
            "signal": f"signal {self.channel} → {self.peer}",
            "wait": f"wait {self.channel} ← {self.peer}",
            "load": f"load ← {self.peer}",
        }
        return words.get(self.kind, self.kind)


@dataclass(frozen=True)
class Rank:
    """What a program knows of itself, and the steps that it can take."""

    rank: int
    size: int
    rounds: range
    made: list[Step] = field(default_factory=list, compare=False, repr=False)  # not yielded yet

    @property
    def everybody(self) -> range:
        """All ranks, this one included."""
        return range(self.size)

    @property
    def peers(self) -> list[int]:
        """All other ranks, the next one first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def put(self, peer: int, number: int) -> Step:
        """Write the stamp of round `number` into this rank's slot of a peer's memory."""
        return self._make("put", peer, number)

    def read(self, writer: int, number: int) -> Step:
        """Read a writer's slot of this rank's own memory; it must hold round `number`."""
        return self._make("read", writer, number)

    def barrier(self) -> Step:
        """Go on when all ranks have come to as many barriers."""
        return self._make("barrier")

    def signal(self, peer: int, channel: str = "full") -> Step:
        """Set the signal word of this rank at a peer; waits until the word is empty."""
        return self._make("signal", peer, channel=channel)

    def wait(self, peer: int, channel: str = "full") -> Step:
        """Wait until a peer's signal word here is set, and empty it."""
        return self._make("wait", peer, channel=channel)

    def store(self, rows: Any) -> Step:
        """Copy rows (a tensor) into this rank's own symmetric buffer."""
        return self._make("store", data=rows)

    def load(self, peer: int, count: int) -> Step:
        """Read the first `count` rows of a peer's symmetric buffer; the yield returns them."""
        return self._make("load", peer, data=count)

    def _make(self, kind: str, peer: int = -1, number: int = 0, **more: Any) -> Step:
        self.made.append(Step(kind, peer, number, **more))
        return self.made[-1]


Program = Callable[[Rank], Generator[Step, Any, None]]


class BadProgram(Exception):
    """A program did what no program can do: no step, a rank that is not there, no end."""


@dataclass(frozen=True)
class Event:
    """One step that was taken: `found` is the round that a read found."""

    rank: int
    step: Step
    found: int = -1

    @property
    def fault(self) -> str:
        """What is wrong with it, by name; empty when nothing is."""
        if self.step.kind != "read" or self.found == self.step.round:
            return ""
        early = self.found < self.step.round
        return "stale (read after write)" if early else "ahead (write after read)"


class Run:
    """Programs of `size` ranks over shared memory, one step at a time."""

    def __init__(self, program: Program, size: int, rounds: int) -> None:
        self.size, self.events = size, list[Event]()
        self.ranks = [Rank(rank, size, range(1, rounds + 1)) for rank in range(size)]
        self.slots = [[NOBODY] * size for _ in range(size)]
        self.words: dict[tuple[int, int, str], bool] = {}
        self.arrived = [0] * size
        self.taken = [0] * size
        self.buffers: list[Any] = [None] * size
        self._programs = [program(me) for me in self.ranks]
        self.next: list[Step | None] = [None] * size
        for rank in range(size):
            self._fetch(rank, None)

    def ready(self) -> list[int]:
        """The ranks that can take their next step."""
        first = min(self.arrived)
        return [
            rank
            for rank, step in enumerate(self.next)
            if step and self.arrived[rank] == first and self._possible(rank, step)
        ]

    def advance(self, rank: int) -> Event:
        """Let a ready rank take one step."""
        step = self.next[rank]
        assert step is not None
        event = Event(rank, step, self._do(rank, step))
        self.events.append(event)
        self.taken[rank] += 1
        return event

    def state(self) -> tuple[Any, ...]:
        """Equal for two orders that have led to the same place."""
        slots = tuple(map(tuple, self.slots))
        words = tuple(sorted(key for key, is_set in self.words.items() if is_set))
        return (*self.taken, slots, words)

    def waiting(self) -> list[int]:
        """The ranks that are not at their end."""
        first = min(self.arrived)
        return [
            rank
            for rank, step in enumerate(self.next)
            if step is not None or self.arrived[rank] > first
        ]

    def _possible(self, rank: int, step: Step) -> bool:
        if step.kind == "signal":
            return not self.words.get((rank, step.peer, step.channel))
        if step.kind == "wait":
            return bool(self.words.get((step.peer, rank, step.channel)))
        return True

    def _do(self, rank: int, step: Step) -> int:
        found, answer = -1, None
        match step.kind:
            case "put":
                self.slots[step.peer][rank] = step.round
            case "read":
                found = answer = self.slots[rank][step.peer]
            case "barrier":
                self.arrived[rank] += 1
            case "signal":
                self.words[rank, step.peer, step.channel] = True
            case "wait":
                self.words[step.peer, rank, step.channel] = False
            case "store":
                self.buffers[rank] = step.data.clone()
            case "load":
                if self.buffers[step.peer] is None:
                    raise BadProgram(
                        f"rank {rank} loads from rank {step.peer}, which has stored nothing yet: "
                        "stale (read after write)"
                    )
                answer = self.buffers[step.peer][: step.data].clone()
        self._fetch(rank, answer)
        return found

    def _fetch(self, rank: int, answer: Any) -> None:
        """Let the program run to its next yield."""
        try:
            step = self._programs[rank].send(answer)
        except StopIteration:
            self.next[rank] = None
            if made := self.ranks[rank].made:
                raise BadProgram(
                    f"rank {rank} makes `{made[0]}` without `yield`: that does nothing"
                ) from None
            return
        if not isinstance(step, Step):
            raise BadProgram(f"rank {rank} yields {step!r}; yield steps, such as me.barrier()")
        if step in self.ranks[rank].made:
            self.ranks[rank].made.remove(step)
        if step.kind not in ("barrier", "store") and step.peer not in range(self.size):
            raise BadProgram(f"rank {rank} names rank {step.peer}; there are {self.size} ranks")
        if self.taken[rank] >= MAX_STEPS:
            raise BadProgram(f"rank {rank} has taken {MAX_STEPS} steps and does not end")
        self.next[rank] = step
