"""Notebook 2, exercises 2 to 4 and 8: barriers, a failing schedule, signals, a pull gather."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.provenance import poison_
from cpkit_lessons import guard, rows, simulate
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.simulate import Failure, InvalidProgram, Program, Rank, Run, Step
from cpkit_lessons.symmetric.questions import LESSON

Steps = Generator[Step, Any, None]
PullGather = Callable[[Rank, torch.Tensor, torch.Tensor, list[torch.Tensor]], Steps]
SEARCHED = ((2, 1), (2, 2), (2, 3), (3, 2))  # (ranks, rounds) of which all orders are searched
RANDOM_RANKS, RANDOM_ROUNDS, RANDOM_ORDERS = 5, 4, 64


# ------------------------------------------------------------------------ reference programs


def exchange_with(barriers: int) -> Program:
    """Return a program that puts to all and reads from all, with 0, 1 or 2 barriers per round.

    The first barrier is between the puts and the reads, the second before the next round's puts.
    """

    def program(me: Rank) -> Steps:
        for number in me.rounds:
            for peer in me.all_ranks:
                yield me.put(peer, number)
            if barriers > 0:
                yield me.barrier()
            for writer in me.all_ranks:
                yield me.read(writer, number)
            if barriers > 1:
                yield me.barrier()

    return program


no_barrier, one_barrier, two_barriers = map(exchange_with, range(3))


def with_signals(me: Rank) -> Steps:
    """Exchange among peers; wait only for the ranks whose rows are read or overwritten."""
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


def blocked_by(program: Program, size: int, slow: int) -> int:
    """Return the number of ranks that cannot finish round 1 while `slow` takes no step."""
    run = Run(program, size, 1)
    while ready := [rank for rank in run.ready() if rank != slow]:
        run.advance(ready[0])
    return len([rank for rank in run.unfinished() if rank != slow])


# ----------------------------------------------------------------------------- exercises 2 to 4


@LESSON.exercise("e2", "two barriers")
def check_exchange(exchange: Program) -> Score:
    """Search all orders of 2 and 3 ranks, then random orders of 5."""
    program = guard.guarded_steps(exchange)
    cases = _check_orders(program, with_itself=True)
    yours, reference = (_count(each, "barrier") // 4 for each in (program, two_barriers))
    return Score(cases, {"barriers per round": (_per_round(yours), _per_round(reference))})


@LESSON.exercise("e3", "make it fail")
def check_order(order: Sequence[int]) -> Score:
    """Check that an order of two ranks is possible for `one_barrier` and makes a read wrong."""
    if not isinstance(order, list | tuple) or not all(
        isinstance(rank, int) and rank in (0, 1) for rank in order
    ):
        raise WrongAnswer(
            f"an order is a list of 0 and 1, the rank of each step; got {order!r:.60}"
        )
    try:
        failure = simulate.first_fault(one_barrier, 2, 2, order)
    except ValueError as impossible:
        raise WrongAnswer(f"your order cannot happen: {impossible}") from None
    if failure is None:
        run = simulate.replay(one_barrier, 2, 2, order)
        at = ", ".join(
            f"the next step of rank {r} is `{s}`" if s else f"rank {r} has finished"
            for r, s in enumerate(run.next)
        )
        raise WrongAnswer(f"no read is wrong in these {len(order)} steps; after them, {at}")
    if failure.events[-1].rank == 1:
        raise WrongAnswer(
            "the first wrong read is one of rank 1, as in the figure; rank 0 must be the slow rank"
        )
    smallest = simulate.smallest_failure(one_barrier, 2, 2).failure
    assert smallest is not None
    steps = {"steps": (len(failure.events), len(smallest.events))}
    return Score(1, steps, note=f"the first wrong read is {failure.kind}")


@LESSON.exercise("e4", "signals instead of barriers")
def check_signals(exchange_signals: Program) -> Score:
    """Check as in exercise 2, without a barrier and without a deadlock."""
    program = guard.guarded_steps(exchange_signals)
    cases = _check_orders(program, with_itself=False)
    if _count(program, "barrier"):
        raise WrongAnswer("the program still has a barrier; use me.signal and me.wait")
    yours, reference = (_count(each, "signal") for each in (program, with_signals))
    return Score(
        cases, {"signals per round of 4 ranks": (_per_round(yours), _per_round(reference))}
    )


def _check_orders(program: Program, *, with_itself: bool) -> int:
    """Return how many states and orders passed. Raises WrongAnswer with the smallest failure."""
    cases = 0
    try:
        for _ in Run(program, 2, 1).finish_randomly(random.Random(0)):
            pass  # the end of a run raises for steps without `yield`
        for size, rounds in SEARCHED:
            search = simulate.smallest_failure(program, size, rounds)
            _check_passed(search.failure, size, rounds)
            cases += search.states
        _check_reads_all(program, with_itself=with_itself)
        for seed in range(RANDOM_ORDERS):
            failure = simulate.random_failure(program, RANDOM_RANKS, RANDOM_ROUNDS, seed)
            _check_passed(failure, RANDOM_RANKS, RANDOM_ROUNDS)
            cases += 1
    except InvalidProgram as fault:
        raise WrongAnswer(str(fault)) from None
    except ValueError as problem:
        raise WrongAnswer(
            f"the program has too many steps to search all orders ({problem}): use fewer steps per "
            f"round"
        ) from None
    return cases


def _check_passed(failure: Failure | None, size: int, rounds: int) -> None:
    if failure:
        raise WrongAnswer(f"{size} ranks, {rounds} round{'s' * (rounds > 1)}: {failure}")


def _check_reads_all(program: Program, *, with_itself: bool) -> None:
    """Check that every rank puts to and reads all: a program without reads never fails."""
    run = _finished(program, 3, 2)
    for rank in run.ranks:
        wanted = set(rank.all_ranks if with_itself else rank.peers)
        each = "rank" if with_itself else "peer"
        for kind, preposition in (("put", "to"), ("read", "from")):
            for number in rank.rounds:
                mine = [e.step for e in run.events if e.rank == rank.rank and e.step.kind == kind]
                got = {step.peer for step in mine if step.round == number}
                if missing := sorted(wanted - got):
                    raise WrongAnswer(
                        f"rank {rank.rank} of 3 must {kind} {preposition} every {each} in every "
                        f"round; in round {number} it omits rank(s) "
                        f"{', '.join(map(str, missing))}"
                    )


def _finished(program: Program, size: int, rounds: int) -> Run:
    """Run in lockstep to the end. Raises WrongAnswer for a deadlock, not for a wrong read."""
    run = Run(program, size, rounds)
    run.finish_in_lockstep()
    _check_passed(simulate.deadlock(run), size, rounds)
    return run


def _count(program: Program, kind: str) -> int:
    """Return the number of steps of a kind in 10 rounds of 4 ranks."""
    try:
        return sum(event.step.kind == kind for event in _finished(program, 4, 10).events)
    except InvalidProgram as fault:
        raise WrongAnswer(str(fault)) from None


def _per_round(count: int) -> float:
    return count // 10 if count % 10 == 0 else count / 10


# ---------------------------------------------------------------------------------- exercise 8


_AT_ONCE = "ranks that load from one rank at once"


@LESSON.exercise("e8", "a pull gather")
def check_pull_gather(pull_gather: PullGather) -> Score:
    """Run 64 random orders of 2 to 5 ranks: uneven shards, three rounds in the same buffers."""
    gather = guard.guarded_steps(pull_gather)
    for seed in range(RANDOM_ORDERS):
        draw = random.Random(seed)
        size = draw.randint(2, 5)
        lengths = [draw.randint(2 * size, 3 * size + 4) for _ in range(draw.randint(1, 2))]
        layout = prepare_context_parallel_metadata(lengths, size)
        _run_gather(gather, layout, seed)
    layout = prepare_context_parallel_metadata([19], 4)
    yours, reference = (_costs(each, layout) for each in (gather, _reference_gather))
    if (loads := yours[_AT_ONCE]) > reference[_AT_ONCE]:
        raise WrongAnswer(
            f"every row is right, but {loads} of 4 ranks load from the same rank at the same time "
            f"when all of them are equally fast; choose an order in which no two ranks do"
        )
    return Score(RANDOM_ORDERS, {unit: (yours[unit], reference[unit]) for unit in reference})


def _reference_gather(
    me: Rank, shard: torch.Tensor, out: torch.Tensor, tokens: list[torch.Tensor]
) -> Steps:
    yield me.store(shard)
    yield me.barrier()
    for step in range(me.size):
        peer = (me.rank + step) % me.size
        out[tokens[peer]] = yield me.load(peer, len(tokens[peer]))
    yield me.barrier()


def _gather_program(gather: PullGather, layout: ContextParallelMetadata) -> Program:
    """Return a program that calls the gather once per round and compares every bit."""
    tokens = [layout.rank_rows(rank) for rank in range(layout.cp_size)]

    def program(me: Rank) -> Steps:
        for number in me.rounds:
            wanted = rows.token_order(layout, number)
            shard = rows.shard(layout, me.rank, number)
            out = poison_(torch.empty_like(wanted))
            yield from gather(me, shard, out, [each.clone() for each in tokens])
            call = f"round {number}, rank {me.rank} of pull_gather"
            rows.check_rows(call, out, wanted, layout)

    return program


def _run_gather(gather: PullGather, layout: ContextParallelMetadata, seed: int) -> None:
    try:
        run = Run(_gather_program(gather, layout), layout.cp_size, rounds=3)
        for _ in run.finish_randomly(random.Random(seed)):
            pass
    except InvalidProgram as fault:
        raise WrongAnswer(str(fault)) from None
    if failure := simulate.deadlock(run):
        raise WrongAnswer(f"random order {seed}, with {layout.cp_size} ranks: {failure}")


def _costs(gather: PullGather, layout: ContextParallelMetadata) -> dict[str, int]:
    """Return barriers per rank, rows loaded, and the most loads from one rank at the same time."""
    run = Run(_gather_program(gather, layout), layout.cp_size, 1)
    run.finish_in_lockstep()
    steps = [event.step for event in run.events]
    loads: list[list[int]] = [[] for _ in range(layout.cp_size)]
    for event in run.events:
        if event.step.kind == "load":
            loads[event.rank].append(event.step.peer)
    at_once = [Counter(peers).most_common(1)[0][1] for peers in zip(*loads, strict=False)]
    return {
        "barriers": sum(step.kind == "barrier" for step in steps) // layout.cp_size,
        "rows loaded": sum(step.data for step in steps if step.kind == "load"),
        _AT_ONCE: max(at_once, default=0),
    }
