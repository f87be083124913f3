"""docs/reliability.md shows the newest records, and these have no failures."""

from __future__ import annotations

import pytest

from benchmarks import reliability


def test_the_page_is_up_to_date() -> None:
    written = reliability.PAGE.read_text()
    assert written == reliability.page(), "run python -m benchmarks.reliability"


def test_the_recorded_runs_left_nothing_and_failed_nowhere() -> None:
    chaos = reliability.faults_of_all_runs()
    fuzz, messages = map(reliability.newest, ("fuzz", "messages"))
    assert chaos["survived"] == chaos["injected"] >= 300
    assert sum(kind["injected"] for kind in chaos["by_kind"].values()) == chaos["injected"]
    assert not chaos["left_over"]
    assert not fuzz["failures"]
    assert messages["decoder"]["decoded"] >= 10**6
    assert messages["workers"]["sent"] >= 10**5
    assert not messages["decoder"]["failures"] + messages["workers"]["failures"]


@pytest.mark.parametrize(("kind", "minutes"), [("load", 10), ("soak", 60)])
def test_under_load_nothing_failed_and_nothing_grew(kind: str, minutes: float) -> None:
    run = reliability.newest(kind)
    assert not run["problems"]
    assert run["minutes"] >= minutes
    assert max(run["growth"].values()) < 0.05
