"""Every order in which the programs of several ranks can run, and the smallest one that fails.

`smallest_failure` looks at all orders, shortest first, so what it finds can't be said in fewer
steps. It knows two failures: a read that finds another round, and ranks that wait for ever.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from cpkit_lessons.programs import BadProgram, Event, Program, Run

__all__ = [
    "BadProgram",
    "Failure",
    "Search",
    "deadlock",
    "first_fault",
    "random_failure",
    "random_order",
    "replay",
    "smallest_failure",
]


@dataclass(frozen=True)
class Failure:
    """An order that fails. `events` in the order they happened; `stuck`: who waits for ever."""

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
        turns = groupby(self.events, key=lambda event: event.rank)
        steps = "; ".join(
            f"rank {rank}: {', '.join(str(e.step) for e in es)}" for rank, es in turns
        )
        if self.stuck:
            who = ", ".join(f"rank {rank} at {where}" for rank, where in self.stuck)
            when = f"after {len(self.events)} steps ({steps})" if steps else "at the first step"
            return f"deadlock, {who}, {when}"
        last = self.events[-1]
        found = f"round {last.found}" if last.found else "nothing yet"
        return (
            f"{last.fault}: rank {last.rank} wants round {last.step.round} of rank "
            f"{last.step.peer} and finds {found}, in {len(self.events)} steps ({steps})"
        )


@dataclass(frozen=True)
class Search:
    """What a search found: `failure` is None when no order of `states` fails."""

    states: int
    failure: Failure | None


def smallest_failure(program: Program, size: int, rounds: int, max_states: int = 20_000) -> Search:
    """The failing order with the fewest steps, or the proof that there is none.

    Breadth first over all states that `size` ranks can reach in `rounds` rounds. Raises BadProgram
    for a program that is none, ValueError when there are more than `max_states`.
    """
    seen, queue = {Run(program, size, rounds).state()}, deque[tuple[int, ...]]([()])
    while queue:
        order = queue.popleft()
        run = replay(program, size, rounds, order)
        ready = run.ready()
        if not ready and run.waiting():
            return Search(len(seen), deadlock(run))
        for rank in ready:
            branch = replay(program, size, rounds, order)
            if branch.advance(rank).fault:
                return Search(len(seen), Failure(size, tuple(branch.events)))
            state = branch.state()
            if state not in seen:
                seen.add(state)
                queue.append((*order, rank))
        if len(seen) > max_states:
            raise ValueError(f"more than {max_states} states: take fewer ranks or rounds")
    return Search(len(seen), None)


def replay(program: Program, size: int, rounds: int, order: Sequence[int]) -> Run:
    """Run in a given order. Raises ValueError where the rank whose turn it is cannot go on."""
    run = Run(program, size, rounds)
    for number, rank in enumerate(order, start=1):
        if rank not in run.ready():
            raise ValueError(f"step {number}: rank {rank} {_why_not(run, rank)}")
        run.advance(rank)
    return run


def _why_not(run: Run, rank: int) -> str:
    """Why a rank cannot take a step now."""
    if rank not in run.waiting():
        return "has nothing left to do"
    if run.arrived[rank] > min(run.arrived):
        return f"waits at the barrier for rank {run.arrived.index(min(run.arrived))}"
    return f"has to wait before {run.next[rank]}"


def first_fault(program: Program, size: int, rounds: int, order: Sequence[int]) -> Failure | None:
    """What goes wrong first in a given order. Raises ValueError for an impossible order."""
    events = replay(program, size, rounds, order).events
    for number, event in enumerate(events, start=1):
        if event.fault:
            return Failure(size, tuple(events[:number]))
    return None


def random_failure(program: Program, size: int, rounds: int, seed: int) -> Failure | None:
    """Run to the end in one random order; what goes wrong first."""
    run = Run(program, size, rounds)
    for _ in random_order(run, random.Random(seed)):
        if run.events[-1].fault:
            return Failure(size, tuple(run.events))
    return deadlock(run) if run.waiting() else None


def random_order(run: Run, draw: random.Random) -> Iterator[int]:
    """Advance by chance until nobody can; each rank that took a step.

    One rank is the favourite for a while: even luck alone would hardly ever let a rank lag far.
    """
    favourite = 0
    while ready := run.ready():
        if draw.random() < 0.1:
            favourite = draw.randrange(run.size)
        rank = favourite if favourite in ready and draw.random() < 0.7 else draw.choice(ready)
        run.advance(rank)
        yield rank


def deadlock(run: Run) -> Failure:
    """The failure of a run in which nobody can go on and somebody is not at the end."""
    stuck = [(rank, str(run.next[rank] or "the barrier")) for rank in run.waiting()]
    first = min(run.arrived)
    at = [(r, "the barrier" if run.arrived[r] > first else where) for r, where in stuck]
    return Failure(run.size, tuple(run.events), tuple(at))
