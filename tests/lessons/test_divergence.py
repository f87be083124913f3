"""Free lists that differ: which rows a push loses and which it overwrites."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpkit_lessons.divergence import BEFORE, GATHER, simulate_push

LATE = [("alloc", "old", 8), ("alloc", "kv", 4)]
EARLY = [*LATE, ("free", "old", 0)]


@pytest.mark.parametrize("trace", [LATE, EARLY])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equal_free_lists_lose_nothing(trace: list, size: int) -> None:
    found = simulate_push([trace] * size, shard_rows=2, arena_rows=24)
    assert not found.diverged
    assert not any(map(len, found.lost + found.overwritten))
    for memory in found.memory:
        recv = memory[found.recv[0] :][: 2 * size]
        assert recv.tolist() == [[GATHER, w, 0, row] for w in range(size) for row in range(2)]
    assert found.explain().endswith("every row is right")


def test_a_late_free_loses_rows_and_overwrites_others() -> None:
    found = simulate_push([EARLY, LATE], shard_rows=3, arena_rows=18)
    assert found.recv == (0, 12)
    assert [rows.tolist() for rows in found.lost] == [[3, 4, 5], [0, 1, 2]]
    assert [rows.tolist() for rows in found.overwritten] == [[], [0, 1, 2]]
    assert found.memory[1][0].tolist() == [GATHER, 0, 0, 0], "rank 0's row over rank 1's block"
    assert (
        "rank 1: row 0 of its arena was in use, and now holds round 2 of rank 0" in found.explain()
    )
    assert "rank 0: row 3 of recv was never written" in found.explain()


@given(st.lists(st.integers(0, 2), min_size=2, max_size=4), st.integers(1, 3))
def test_lost_and_overwritten_rows_follow_from_the_memory(kept: list[int], shard_rows: int) -> None:
    """The ranks have freed 0, 1 or 2 of their blocks."""
    blocks = [("alloc", name, 5) for name in "abc"]
    traces = [[*blocks, *[("free", name, 0) for name in "ab"[:n]]] for n in kept]
    found = simulate_push(traces, shard_rows, arena_rows=40)
    want = [[GATHER, w, 0, row] for w in range(len(kept)) for row in range(shard_rows)]
    for rank, memory in enumerate(found.memory):
        recv = memory[found.recv[rank] :][: len(want)]
        assert np.flatnonzero((recv != want).any(1)).tolist() == found.lost[rank].tolist()
        used = range(5 * kept[rank], 15)
        gone = [row for row in used if memory[row][0] != BEFORE]
        assert gone == found.overwritten[rank].tolist()
    assert found.diverged or not any(map(len, found.lost))


def test_an_arena_that_is_too_small_is_named() -> None:
    with pytest.raises(ValueError, match="recv of 6 rows does not fit"):
        simulate_push([LATE, LATE], shard_rows=3, arena_rows=14)
