"""The barrier's ways to wait: right with a core per rank and with several, and idle when long."""

from __future__ import annotations

import time

from cpkit.group import CPGroup
from cpkit.sync.barrier import ShmBarrier
from tests.ranks.device import world_group

WAYS = ((0, 64, True), (500, 256, False), (0, 1, True), (0, 1, False))
LATE_S = 1.0


def group_and_board() -> tuple[CPGroup, ShmBarrier]:
    group = world_group()
    assert group.board is not None
    return group, group.board


def check_every_way_to_wait_is_a_barrier() -> None:
    group, board = group_and_board()
    for polls, yields, crowded in WAYS:
        board._polls, board._yields, board._crowded = polls, yields, crowded
        for round in range(300):
            if round % 50 == group.rank:
                time.sleep(0.003)
            notes = group.exchange(b"%d of %d" % (round, group.rank))
            assert notes == [b"%d of %d" % (round, rank) for rank in range(group.size)]


def check_a_long_wait_leaves_the_core_alone() -> None:
    """All others wait for the last rank, whichever way they begin to."""
    group, board = group_and_board()
    for polls, yields, crowded in WAYS[:2]:
        board._polls, board._yields, board._crowded = polls, yields, crowded
        group.barrier()
        if group.rank == group.size - 1:
            time.sleep(LATE_S)
        used_s = time.process_time()
        group.barrier()
        used_s = time.process_time() - used_s
        assert used_s < LATE_S / 4, f"waiting {LATE_S} s took {used_s:.2f} s of CPU time"


def check_the_way_follows_from_ranks_and_cores() -> None:
    from cpkit.sync.barrier import cores

    group, board = group_and_board()
    assert board._crowded == (group.size > cores())
    assert (board._polls == 0) == board._crowded


def check_patience_is_learned() -> None:
    """Where ranks share a core: a wait that napped makes it short, one that did not, longer."""
    group, board = group_and_board()
    late = group.rank == group.size - 1
    board._polls, board._yields, board._crowded = 0, 64, True
    group.barrier()
    if late:
        time.sleep(0.01)
    group.barrier()
    assert late or board._yields <= 8, board._yields
    board._yields = 4
    for _ in range(200):
        group.barrier()
    assert board._yields > 4
