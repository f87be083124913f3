"""docs/reliability.md shows the newest records, and these have no failures."""

from __future__ import annotations

from benchmarks import reliability


def test_the_page_is_up_to_date() -> None:
    written = reliability.PAGE.read_text()
    assert written == reliability.page(), "run python -m benchmarks.reliability"


def test_the_recorded_runs_left_nothing_and_failed_nowhere() -> None:
    chaos, load, fuzz = map(reliability.newest, ("chaos", "load", "fuzz"))
    assert chaos["survived"] == chaos["injected"] >= 50
    assert not chaos["left_over"]
    assert not load["problems"]
    assert load["minutes"] >= 3
    assert not fuzz["failures"]
