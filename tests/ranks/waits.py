"""The wait strategies of the barrier, with and without a core per rank; a long wait uses no CPU."""

from __future__ import annotations

import time

from cpkit.group import CPGroup
from cpkit.sync.barrier import ShmBarrier
from tests.ranks.device import world_group

WAYS = ((0, 64, True), (500, 256, False), (0, 1, True), (0, 1, False))
LATE_S = 1.0


def group_and_barrier() -> tuple[CPGroup, ShmBarrier]:
    group = world_group()
    assert group.shm_barrier is not None
    return group, group.shm_barrier


def check_the_barrier_is_right_with_every_wait_strategy() -> None:
    group, barrier = group_and_barrier()
    for polls, yields, crowded in WAYS:
        barrier._polls, barrier._yields, barrier._crowded = polls, yields, crowded
        for round in range(300):
            if round % 50 == group.rank:
                time.sleep(0.003)
            notes = group.exchange(b"%d of %d" % (round, group.rank))
            assert notes == [b"%d of %d" % (round, rank) for rank in range(group.size)]


def check_a_long_wait_uses_little_cpu_time() -> None:
    """All other ranks wait for the last one."""
    group, barrier = group_and_barrier()
    for polls, yields, crowded in WAYS[:2]:
        barrier._polls, barrier._yields, barrier._crowded = polls, yields, crowded
        group.barrier()
        if group.rank == group.size - 1:
            time.sleep(LATE_S)
        used_s = time.process_time()
        group.barrier()
        used_s = time.process_time() - used_s
        assert used_s < LATE_S / 4, f"waiting {LATE_S} s took {used_s:.2f} s of CPU time"


def check_the_strategy_follows_from_ranks_and_cores() -> None:
    from cpkit.sync.barrier import cores

    group, barrier = group_and_barrier()
    assert barrier._crowded == (group.size > cores())
    assert (barrier._polls == 0) == barrier._crowded


def check_the_number_of_yields_adapts() -> None:
    """If ranks share a core, a wait that slept lowers the number; one that did not raises it."""
    group, barrier = group_and_barrier()
    late = group.rank == group.size - 1
    barrier._polls, barrier._yields, barrier._crowded = 0, 64, True
    group.barrier()
    if late:
        time.sleep(0.01)
    group.barrier()
    assert late or barrier._yields <= 8, barrier._yields
    barrier._yields = 4
    for _ in range(200):
        group.barrier()
    assert barrier._yields > 4
