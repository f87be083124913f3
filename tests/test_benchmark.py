"""The benchmark refuses a wrong gather, sees a slow one, and README shows what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures
from tests.launch import ROOT, assert_passed

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-cpu.json"))


def test_readme_shows_the_latest_record() -> None:
    readme = (ROOT / "README.md").read_text()
    assert RESULTS, "no record yet: run make bench"
    record = json.loads(RESULTS[-1].read_text())
    assert figures.filled(readme, record, RESULTS[-1].name) == readme
    record["gather"][0]["time_us"] *= 2
    assert figures.filled(readme, record, RESULTS[-1].name) != readme


def test_a_readme_without_markers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figures:begin"):
        figures.filled("nothing here", {}, "x.json")


@pytest.mark.workers
@pytest.mark.parametrize("check", ["check_a_wrong_gather_is_not_timed", "check_a_slow_one_is_seen"])
def test_negative_controls(check: str) -> None:
    assert_passed("tests.ranks.benchmark", 2, check)
