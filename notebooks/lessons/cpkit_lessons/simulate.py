"""Simulate programs of several ranks over one shared memory, and find the shortest failing order.

A program is a generator; each `yield` is one step that other ranks can observe. Between two steps
of a rank the other ranks may take any number of steps.

    def exchange(me):
        for number in me.rounds:
            for peer in me.all_ranks:
                yield me.put(peer, number)      # this round's stamp, into this rank's slot there
            yield me.barrier()
            for writer in me.all_ranks:
                yield me.read(writer, number)   # must return the stamp of this round
            yield me.barrier()

The memory is sequentially consistent: all ranks observe a step at once. Real memory is weaker, so a
program that fails here fails on any machine, and one that passes still needs the memory fences of
its barrier.

`smallest_failure` searches all orders, shortest first, so no shorter order fails. There are two
kinds of failure: a read that returns another round, and ranks that wait forever.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

MAX_STEPS = 400  # per rank; a program that takes more is considered endless
NEVER_WRITTEN = 0  # the round that a slot holds before its first put


# ------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Step:
    """One step of a rank; created by the methods of `Rank`."""

    kind: str
    peer: int = -1
    round: int = 0
    channel: str = ""
    data: Any = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        text = {
            "put": f"put → {self.peer}",
            "read": f"read slot {self.peer}",
            "signal": f"signal {self.channel} → {self.peer}",
            "wait": f"wait {self.channel} ← {self.peer}",
            "load": f"load ← {self.peer}",
        }
        return text.get(self.kind, self.kind)


@dataclass(frozen=True)
class Rank:
    """The argument of a program: its rank, the group's size, and the steps that it can yield."""

    rank: int
    size: int
    rounds: range
    not_yielded: list[Step] = field(default_factory=list, compare=False, repr=False)

    @property
    def all_ranks(self) -> range:
        """All ranks, this one included."""
        return range(self.size)

    @property
    def peers(self) -> list[int]:
        """All other ranks, starting with the next one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def put(self, peer: int, number: int) -> Step:
        """Write the stamp of round `number` into this rank's slot of a peer's memory."""
        return self._create("put", peer, number)

    def read(self, writer: int, number: int) -> Step:
        """Read a writer's slot of this rank's own memory; it must hold round `number`."""
        return self._create("read", writer, number)

    def barrier(self) -> Step:
        """Wait until all ranks have arrived at this barrier."""
        return self._create("barrier")

    def signal(self, peer: int, channel: str = "full") -> Step:
        """Set this rank's signal at a peer; wait first until the peer has consumed the last one."""
        return self._create("signal", peer, channel=channel)

    def wait(self, peer: int, channel: str = "full") -> Step:
        """Wait until a peer's signal at this rank is set, and clear it."""
        return self._create("wait", peer, channel=channel)

    def store(self, rows: Any) -> Step:
        """Copy rows (a tensor) into this rank's own symmetric buffer."""
        return self._create("store", data=rows)

    def load(self, peer: int, count: int) -> Step:
        """Read the first `count` rows of a peer's symmetric buffer; the yield returns them."""
        return self._create("load", peer, data=count)

    def _create(self, kind: str, peer: int = -1, number: int = 0, **more: Any) -> Step:
        self.not_yielded.append(Step(kind, peer, number, **more))
        return self.not_yielded[-1]


Program = Callable[[Rank], Generator[Step, Any, None]]


class InvalidProgram(Exception):
    """Raised for a program that yields a non-step, names a missing rank, or does not end."""


@dataclass(frozen=True)
class Event:
    """One executed step. `found`: the round that a read returned."""

    rank: int
    step: Step
    found: int = -1

    @property
    def fault(self) -> str:
        """The name of the error in this step; empty for a correct step."""
        if self.step.kind != "read" or self.found == self.step.round:
            return ""
        early = self.found < self.step.round
        return "stale (read after write)" if early else "ahead (write after read)"

    @property
    def mismatch(self) -> str:
        """What a wrong read expects and returns."""
        found = f"round {self.found}" if self.found != NEVER_WRITTEN else "an empty slot"
        return f"expects round {self.step.round} of rank {self.step.peer} and finds {found}"


class Run:
    """One execution of a program on `size` ranks, advanced one step at a time."""

    def __init__(self, program: Program, size: int, rounds: int) -> None:
        self.size, self.events = size, list[Event]()
        self.ranks = [Rank(rank, size, range(1, rounds + 1)) for rank in range(size)]
        self.slots = [[NEVER_WRITTEN] * size for _ in range(size)]
        self.signals: set[tuple[int, int, str]] = set()  # (sender, receiver, channel)
        self.arrived = [0] * size  # barriers, by rank
        self.taken = [0] * size  # steps, by rank
        self.buffers: list[Any] = [None] * size
        self.next: list[Step | None] = [None] * size
        self._programs = [program(me) for me in self.ranks]
        for rank in range(size):
            self._fetch(rank, None)

    def ready(self) -> list[int]:
        """Return the ranks that can take their next step."""
        return [
            rank
            for rank, step in enumerate(self.next)
            if step and not self.at_barrier(rank) and self._is_enabled(rank, step)
        ]

    def unfinished(self) -> list[int]:
        """Return the ranks that have not ended."""
        return [r for r, step in enumerate(self.next) if step is not None or self.at_barrier(r)]

    def at_barrier(self, rank: int) -> bool:
        """Whether a rank waits at a barrier for another rank."""
        return self.arrived[rank] > min(self.arrived)

    def advance(self, rank: int) -> Event:
        """Execute the next step of a ready rank."""
        step = self.next[rank]
        assert step is not None
        event = Event(rank, step, self._execute(rank, step))
        self.events.append(event)
        self.taken[rank] += 1
        return event

    def finish_in_lockstep(self) -> None:
        """Advance the rank that has taken the fewest steps until no rank can advance."""
        while ready := self.ready():
            self.advance(min(ready, key=lambda rank: self.taken[rank]))

    def finish_randomly(self, draw: random.Random) -> Iterator[Event]:
        """Advance random ranks until no rank can advance; yield each step.

        One rank is preferred for a while, because uniform choices would rarely let a rank lag far.
        """
        preferred = 0
        while ready := self.ready():
            if draw.random() < 0.1:
                preferred = draw.randrange(self.size)
            keep = preferred in ready and draw.random() < 0.7
            yield self.advance(preferred if keep else draw.choice(ready))

    def state(self) -> tuple[Any, ...]:
        """Return a key that is equal for two orders that lead to the same state."""
        return (*self.taken, tuple(map(tuple, self.slots)), frozenset(self.signals))

    def _is_enabled(self, rank: int, step: Step) -> bool:
        if step.kind == "signal":
            return (rank, step.peer, step.channel) not in self.signals
        if step.kind == "wait":
            return (step.peer, rank, step.channel) in self.signals
        return True

    def _execute(self, rank: int, step: Step) -> int:
        found, answer = -1, None
        match step.kind:
            case "put":
                self.slots[step.peer][rank] = step.round
            case "read":
                found = answer = self.slots[rank][step.peer]
            case "barrier":
                self.arrived[rank] += 1
            case "signal":
                self.signals.add((rank, step.peer, step.channel))
            case "wait":
                self.signals.remove((step.peer, rank, step.channel))
            case "store":
                self.buffers[rank] = step.data.clone()
            case "load":
                if self.buffers[step.peer] is None:
                    raise InvalidProgram(
                        f"rank {rank} loads from rank {step.peer}, which has stored nothing yet: "
                        "stale (read after write)"
                    )
                answer = self.buffers[step.peer][: step.data].clone()
        self._fetch(rank, answer)
        return found

    def _fetch(self, rank: int, answer: Any) -> None:
        """Resume the program up to its next yield."""
        not_yielded = self.ranks[rank].not_yielded
        try:
            step = self._programs[rank].send(answer)
        except StopIteration:
            self.next[rank] = None
            if not_yielded:
                raise InvalidProgram(
                    f"rank {rank} creates `{not_yielded[0]}` without `yield`, which has no effect"
                ) from None
            return
        if not isinstance(step, Step):
            raise InvalidProgram(f"rank {rank} yields {step!r}; yield steps, such as me.barrier()")
        if step in not_yielded:
            not_yielded.remove(step)
        if step.kind not in ("barrier", "store") and step.peer not in range(self.size):
            raise InvalidProgram(
                f"rank {rank} names rank {step.peer!r}; there are {self.size} ranks"
            )
        if self.taken[rank] >= MAX_STEPS:
            raise InvalidProgram(f"rank {rank} has taken {MAX_STEPS} steps and does not end")
        self.next[rank] = step


# --------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class Failure:
    """A failing order: its events, and (rank, step) of each rank that waits forever."""

    size: int
    events: tuple[Event, ...]
    stuck: tuple[tuple[int, str], ...] = ()

    @property
    def kind(self) -> str:
        """`stale (read after write)`, `ahead (write after read)`, or `deadlock`."""
        return self.events[-1].fault if not self.stuck else "deadlock"

    @property
    def schedule(self) -> list[int]:
        """The ranks in the order of their steps."""
        return [event.rank for event in self.events]

    def __str__(self) -> str:
        by_rank = groupby(self.events, key=lambda event: event.rank)
        steps = "; ".join(
            f"rank {rank}: {', '.join(str(e.step) for e in es)}" for rank, es in by_rank
        )
        if self.stuck:
            ranks = ", ".join(f"rank {rank} at {step}" for rank, step in self.stuck)
            when = f"after {len(self.events)} steps ({steps})" if steps else "at the first step"
            return f"deadlock, {ranks}, {when}"
        last = self.events[-1]
        count = len(self.events)
        return f"{last.fault}: rank {last.rank} {last.mismatch}, in {count} steps ({steps})"


@dataclass(frozen=True)
class Search:
    """The result of a search: the number of states visited, and the failure or None."""

    states: int
    failure: Failure | None


def smallest_failure(program: Program, size: int, rounds: int, max_states: int = 20_000) -> Search:
    """Find the failing order with the fewest steps, or prove that no order fails.

    Searches breadth first all states that `size` ranks can reach in `rounds` rounds. Raises
    InvalidProgram, and ValueError when there are more than `max_states` states.
    """
    seen, queue = {Run(program, size, rounds).state()}, deque[tuple[int, ...]]([()])
    while queue:
        order = queue.popleft()
        run = replay(program, size, rounds, order)
        if failure := deadlock(run):
            return Search(len(seen), failure)
        for rank in run.ready():
            branch = replay(program, size, rounds, order)
            if branch.advance(rank).fault:
                return Search(len(seen), Failure(size, tuple(branch.events)))
            state = branch.state()
            if state not in seen:
                seen.add(state)
                queue.append((*order, rank))
        if len(seen) > max_states:
            raise ValueError(f"more than {max_states} states")
    return Search(len(seen), None)


def replay(program: Program, size: int, rounds: int, order: Sequence[int]) -> Run:
    """Run in the given order. Raises ValueError at a step that its rank cannot take."""
    run = Run(program, size, rounds)
    for number, rank in enumerate(order, start=1):
        if rank not in run.ready():
            raise ValueError(f"step {number}: rank {rank} {_why_not_ready(run, rank)}")
        run.advance(rank)
    return run


def _why_not_ready(run: Run, rank: int) -> str:
    if rank not in run.unfinished():
        return "has already ended"
    if run.at_barrier(rank):
        return f"waits at the barrier for rank {run.arrived.index(min(run.arrived))}"
    return f"cannot execute `{run.next[rank]}` yet"


def first_fault(program: Program, size: int, rounds: int, order: Sequence[int]) -> Failure | None:
    """Return the first failure in a given order. Raises ValueError for an impossible order."""
    events = replay(program, size, rounds, order).events
    for number, event in enumerate(events, start=1):
        if event.fault:
            return Failure(size, tuple(events[:number]))
    return None


def random_failure(program: Program, size: int, rounds: int, seed: int) -> Failure | None:
    """Run in one random order; return the first failure."""
    run = Run(program, size, rounds)
    for event in run.finish_randomly(random.Random(seed)):
        if event.fault:
            return Failure(size, tuple(run.events))
    return deadlock(run)


def deadlock(run: Run) -> Failure | None:
    """Return the failure of a run in which no rank can advance and some rank has not ended."""
    if run.ready() or not run.unfinished():
        return None
    stuck = tuple(
        (rank, "the barrier" if run.at_barrier(rank) else str(run.next[rank]))
        for rank in run.unfinished()
    )
    return Failure(run.size, tuple(run.events), stuck)
