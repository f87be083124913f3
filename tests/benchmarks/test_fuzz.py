"""The fuzz command, without ranks: what it does after a failure and after Ctrl-C.

tests/ranks/fuzz.py runs its cases, and tests/ranks/fuzz_mutants.py shows that it detects faults.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.case import draw
from benchmarks.fuzz.oracle import rows_by_rank


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        ("zigzag", [[0, 1, 2, 9, 7, 8, 12], [3, 4, 10, 5, 6, 11]]),
        ("interleave", [[0, 2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11]]),
        ("contiguous", [[0, 1, 2, 3, 9, 10], [4, 5, 6, 7, 8, 11, 12]]),
    ],
)
def test_the_oracle_on_layouts_that_were_drawn_by_hand(
    strategy: str, rows: list[list[int]]
) -> None:
    assert rows_by_rank([9, 4], 2, strategy) == rows


@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_a_failure_prints_its_replay_and_ctrl_c_prints_what_was_done(
    end: type[BaseException] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = {"cases": 7, "gathers": 9, "refused": 1, "counts": {}, "failures": [], "next_seed": 4}
    failure = {"seed": 13, "rank": 1, "problem": "row 3", "case": repr(draw(13))}

    def launch(total: fuzz.Total, world: int, *_: Any) -> None:
        total.add(world, done | {"failures": [] if end else [failure]})
        if end:
            raise end

    monkeypatch.setattr(fuzz, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--gathers", "9", "--no-record"])
    assert fuzz.main() == (130 if end else 1)
    shown = capsys.readouterr()
    assert "9 gathers in 7 cases, 1 calls refused" in shown.out or not end
    assert ("--seed 13" in shown.err) == (end is None)
