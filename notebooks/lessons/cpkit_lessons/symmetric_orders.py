"""Notebook 2, exercises 2 to 4: barriers, a schedule that fails, signals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from cpkit_lessons import guard
from cpkit_lessons import simulate as schedules
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.programs import BadProgram, Program, Rank, Run
from cpkit_lessons.simulate import Failure
from cpkit_lessons.symmetric_questions import LESSON

SEARCHED = ((2, 1), (2, 2), (2, 3), (3, 2))  # (ranks, rounds): all orders
RANDOM_RANKS, RANDOM_ROUNDS, RANDOM_ORDERS = 5, 4, 64
Steps = Any


def exchange_with(barriers: int) -> Program:
    """Put to all and read from all, round after round, with 0, 1 or 2 barriers in each.

    The first stands between puts and reads, the second before the memory is written again.
    """

    def program(me: Rank) -> Steps:
        for number in me.rounds:
            for peer in me.everybody:
                yield me.put(peer, number)
            if barriers > 0:
                yield me.barrier()
            for writer in me.everybody:
                yield me.read(writer, number)
            if barriers > 1:
                yield me.barrier()

    return program


no_barrier, one_barrier, two_barriers = map(exchange_with, range(3))


def with_signals(me: Rank) -> Steps:
    """The same among peers: each waits for those whose rows it reads or overwrites."""
    for number in me.rounds:
        for peer in me.peers:
            if number > 1:
                yield me.wait(peer, "free")
            yield me.put(peer, number)
            yield me.signal(peer, "full")
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.read(peer, number)
            yield me.signal(peer, "free")


@LESSON.exercise("e2", "two barriers")
def check_exchange(exchange: Program) -> Score:
    """All orders of 2 and 3 ranks, then random orders of 5."""
    program = guard.guarded_steps(exchange)
    cases = _must_pass(program, everybody=True)
    return Score(cases, {"barriers a round": _a_round(program, two_barriers, "barrier")})


@LESSON.exercise("e3", "make it fail")
def check_order(order: Sequence[int]) -> Score:
    """An order of two ranks that `one_barrier` can take, and in which a read is ahead."""
    if not isinstance(order, list) or not all(rank in (0, 1) for rank in order):
        raise Wrong(f"an order is a list of 0 and 1, whose turn it is; got {order!r:.60}")
    try:
        failure = schedules.first_fault(one_barrier, 2, 2, order)
    except ValueError as impossible:
        raise Wrong(f"your order cannot happen: {impossible}") from None
    if failure is None:
        run = schedules.replay(one_barrier, 2, 2, order)
        at = ", ".join(
            f"rank {r} before `{s}`" if s else f"rank {r} at its end"
            for r, s in enumerate(run.next)
        )
        raise Wrong(f"no read is wrong in these {len(order)} steps; they leave {at}")
    smallest = schedules.smallest_failure(one_barrier, 2, 2).failure
    assert smallest is not None
    steps = {"steps": (len(failure.events), len(smallest.events))}
    return Score(1, steps, note=f"the first wrong read is {failure.kind}")


@LESSON.exercise("e4", "signals instead of barriers")
def check_signals(exchange: Program) -> Score:
    """As exercise 2, without a barrier, and nobody waits for ever."""
    program = guard.guarded_steps(exchange)
    cases = _must_pass(program, everybody=False)
    if _count(program, "barrier"):
        raise Wrong("there is still a barrier in it: use me.signal and me.wait")
    return Score(cases, {"signals a round, 4 ranks": _a_round(program, with_signals, "signal")})


def held_up(program: Program, size: int, slow: int) -> int:
    """Ranks that can't finish round 1 while `slow` takes no step."""
    run = Run(program, size, 1)
    while ready := [rank for rank in run.ready() if rank != slow]:
        run.advance(ready[0])
    return len([rank for rank in run.waiting() if rank != slow])


def _must_pass(program: Program, *, everybody: bool) -> int:
    """Raise Wrong with the smallest failing schedule; else how many states and orders passed."""
    cases = 0
    try:
        for _ in schedules.random_order(Run(program, 2, 1), random.Random(0)):
            pass  # to its end, where steps without `yield` are told
        for size, rounds in SEARCHED:
            search = schedules.smallest_failure(program, size, rounds)
            _refuse(search.failure, size, rounds)
            cases += search.states
        _must_read_all(program, everybody=everybody)
        for seed in range(RANDOM_ORDERS):
            failure = schedules.random_failure(program, RANDOM_RANKS, RANDOM_ROUNDS, seed)
            _refuse(failure, RANDOM_RANKS, RANDOM_ROUNDS)
            cases += 1
    except BadProgram as fault:
        raise Wrong(str(fault)) from None
    except ValueError as too_many:
        raise Wrong(f"too many steps to look at all orders ({too_many})") from None
    return cases


def _refuse(failure: Failure | None, size: int, rounds: int) -> None:
    if failure:
        raise Wrong(f"{size} ranks, {rounds} round{'s' * (rounds > 1)}: {failure}")


def _must_read_all(program: Program, *, everybody: bool) -> None:
    """A program that reads nothing is never wrong; so every rank must put to and read all."""
    run = _finished(program, 3, 2)
    for rank in run.ranks:
        wanted = list(rank.everybody if everybody else sorted(rank.peers))
        for kind in ("put", "read"):
            for number in rank.rounds:
                mine = [e.step for e in run.events if e.rank == rank.rank and e.step.kind == kind]
                got = sorted({step.peer for step in mine if step.round == number})
                if not set(wanted) <= set(got):
                    missing = sorted(set(wanted) - set(got))
                    raise Wrong(
                        f"rank {rank.rank} of 3, round {number}: no {kind} for rank(s) {missing}"
                    )


def _finished(program: Program, size: int, rounds: int) -> Run:
    """Run in turns to the end; a wrong read does not stop it, a deadlock is Wrong."""
    run = Run(program, size, rounds)
    while ready := run.ready():
        run.advance(min(ready, key=lambda rank: run.taken[rank]))
    if run.waiting():
        failure = schedules.deadlock(run)
        raise Wrong(f"{size} ranks, {rounds} rounds: {failure}")
    return run


def _count(program: Program, kind: str) -> int:
    try:
        return sum(event.step.kind == kind for event in _finished(program, 4, 10).events)
    except BadProgram as fault:
        raise Wrong(str(fault)) from None


def _a_round(program: Program, reference: Program, kind: str) -> tuple[float, float]:
    """Steps of a kind in one round: yours and the reference's (of one rank for barriers)."""
    by = 40 if kind == "barrier" else 10
    mine, theirs = (_count(attempt, kind) / by for attempt in (program, reference))
    return (int(mine) if mine.is_integer() else mine), int(theirs)
