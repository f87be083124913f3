"""The simulator finds the shortest failing order, and only orders that are possible."""

from __future__ import annotations

import pytest

from cpkit_lessons import simulate
from cpkit_lessons.simulate import MAX_STEPS, InvalidProgram, Program, Rank, Run
from cpkit_lessons.symmetric.synchronization import (
    blocked_by,
    no_barrier,
    one_barrier,
    two_barriers,
    with_signals,
)

RIGHT = {"barriers": two_barriers, "signals": with_signals}


def early_free(me: Rank):
    """Signal `free` before the read, which fails in only a few orders."""
    for number in me.rounds:
        for peer in me.peers:
            if number > 1:
                yield me.wait(peer, "free")
            yield me.put(peer, number)
            yield me.signal(peer, "full")
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.signal(peer, "free")
            yield me.read(peer, number)


WRONG = {"no barrier": no_barrier, "one barrier": one_barrier, "early free": early_free}


def brute_force(program: Program, size: int, rounds: int) -> int | None:
    """Return the fewest steps to a wrong read over all orders, without a set of visited states."""
    best, stack = None, [()]
    while stack:
        order = stack.pop()
        run = simulate.replay(program, size, rounds, order)
        for rank in run.ready():
            branch = simulate.replay(program, size, rounds, order)
            if branch.advance(rank).fault:
                best = min(best or len(order) + 1, len(order) + 1)
            elif best is None or len(order) + 1 < best:
                stack.append((*order, rank))
    return best


@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG)
def test_the_failure_found_is_the_shortest_of_all(program: Program) -> None:
    rounds = 1 if program is no_barrier else 2
    failure = simulate.smallest_failure(program, 2, rounds).failure
    assert failure is not None
    assert len(failure.events) == brute_force(program, 2, rounds)
    again = simulate.first_fault(program, 2, rounds, failure.schedule)
    assert str(again) == str(failure), "the schedule reproduces the failure"


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_no_order_breaks_a_right_program(program: Program) -> None:
    assert brute_force(program, 2, 1) is None
    for size, rounds in ((2, 3), (3, 2)):
        search = simulate.smallest_failure(program, size, rounds)
        assert search.failure is None
        assert search.states > 50
    for seed in range(50):
        assert simulate.random_failure(program, 5, 4, seed) is None


@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG)
def test_random_orders_find_what_is_wrong(program: Program) -> None:
    found = [simulate.random_failure(program, 5, 4, seed) for seed in range(64)]
    assert sum(failure is not None for failure in found) > 16


def test_failures_have_their_names() -> None:
    stale = simulate.smallest_failure(no_barrier, 2, 1).failure
    ahead = simulate.smallest_failure(one_barrier, 2, 2).failure
    assert (stale.kind, len(stale.events)) == ("stale (read after write)", 3)
    assert (ahead.kind, len(ahead.events)) == ("ahead (write after read)", 11)
    assert simulate.smallest_failure(one_barrier, 2, 1).failure is None, "one round never fails"


def test_a_signal_waits_until_the_last_one_is_consumed() -> None:
    def program(me):
        if me.rank == 0:
            yield me.signal(1)
            yield me.signal(1)
        else:
            yield me.wait(0)

    run = Run(program, 2, 1)
    run.advance(0)
    assert run.ready() == [1], "the signal is still set"
    run.advance(1)
    assert run.ready() == [0]


def test_no_rank_passes_a_barrier_before_all_arrive() -> None:
    def program(me):
        yield me.put(me.rank, 1)
        yield me.barrier()
        yield me.read(me.rank, 1)

    run = Run(program, 3, 1)
    for rank in (0, 0, 1, 1, 2):
        run.advance(rank)
    assert run.ready() == [2]
    assert run.unfinished() == [0, 1, 2]
    run.advance(2)
    assert run.ready() == [0, 1, 2]


def test_ranks_that_wait_forever_are_a_deadlock() -> None:
    def program(me):
        yield me.wait(me.peers[0])
        yield me.signal(me.peers[0])

    failure = simulate.smallest_failure(program, 2, 1).failure
    assert failure.kind == "deadlock"
    assert "rank 0 at wait full ← 1, rank 1 at wait full ← 0" in str(failure)


def test_a_rank_that_misses_a_barrier_leaves_the_others_there() -> None:
    def program(me):
        if me.rank:
            yield me.barrier()

    assert "rank 1 at the barrier" in str(simulate.smallest_failure(program, 2, 1).failure)


def test_steps_without_yield_are_refused() -> None:
    def program(me):
        yield me.put(0, 1)
        me.barrier()

    with pytest.raises(InvalidProgram, match="rank 0 creates `barrier` without `yield`"):
        simulate.smallest_failure(program, 1, 1)


def test_loading_before_the_store_is_refused() -> None:
    def program(me):
        yield me.load(1, 3)

    with pytest.raises(
        InvalidProgram, match="rank 0 loads from rank 1, which has stored nothing yet"
    ):
        simulate.smallest_failure(program, 2, 1)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="step 4: rank 0 waits at the barrier for rank 1"):
        simulate.replay(one_barrier, 2, 1, [0, 0, 0, 0])
    with pytest.raises(ValueError, match="step 9: rank 1 has already ended"):
        simulate.replay(no_barrier, 2, 2, [1] * 8 + [1])
    with pytest.raises(ValueError, match="more than 5 states"):
        simulate.smallest_failure(two_barriers, 3, 2, max_states=5)


def iter_of(step):
    yield step


def endless(me):
    while True:
        yield me.put(me.rank, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda me: iter_of(3), "rank 0 yields 3"),
        (lambda me: iter_of(me.put(7, 1)), "names rank 7; there are 2 ranks"),
        (endless, f"has taken {MAX_STEPS} steps"),
    ],
)
def test_invalid_programs_are_named(bad: Program, message: str) -> None:
    with pytest.raises(InvalidProgram, match=message):
        simulate.random_failure(bad, 2, 1, seed=0)


def test_the_number_of_ranks_blocked_by_a_slow_rank() -> None:
    assert blocked_by(one_barrier, 8, slow=3) == 7
    assert blocked_by(no_barrier, 8, slow=3) == 0
