"""The exported timeline is valid in Chrome's trace format and complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpkit.control.messages import TraceResult, Workload
from cpkit.timing import Span

SPANS = (
    (Span("agree", 0, 10_500), Span("wire", 10_500, 50_250)),
    (Span("agree", 1_250, 11_000), Span("wire", 12_000, 61_000)),
)


def problems(trace: dict[str, Any]) -> list[str]:
    """Return what a viewer cannot read; empty for a valid trace."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") not in ("X", "M"):
            found.append(f"{event} has no known phase")
        if not (isinstance(event.get("pid"), int) and isinstance(event.get("tid"), int)):
            found.append(f"{event} has no track")
        if event.get("ph") == "X":
            times = (event.get("ts"), event.get("dur"))
            if not all(isinstance(t, int | float) and t >= 0 for t in times):
                found.append(f"{event} has no times")
        elif not isinstance(event.get("args", {}).get("name"), str):
            found.append(f"{event} has no name in its args")
    named = {e["tid"] for e in trace["traceEvents"] if e.get("name") == "thread_name"}
    used = {e["tid"] for e in trace["traceEvents"] if e.get("ph") == "X"}
    return found + [f"rank {rank} has no name" for rank in used - named]


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    workload = Workload(lengths=(64,), cp_size=2)
    path = tmp_path / "trace.json"
    TraceResult(workload, SPANS).save_chrome_trace(path)
    return dict(json.loads(path.read_text()))


def test_it_is_a_valid_chrome_trace(saved: dict[str, Any]) -> None:
    assert problems(saved) == []


def test_it_has_every_stage_of_every_rank(saved: dict[str, Any]) -> None:
    stages = [event for event in saved["traceEvents"] if event["ph"] == "X"]
    got = [(e["tid"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in stages]
    assert got == [
        (0, "agree", 0.0, 10.5),
        (0, "wire", 10.5, 50.25),
        (1, "agree", 1.25, 11.0),
        (1, "wire", 12.0, 61.0),
    ]


def test_it_says_what_was_gathered(saved: dict[str, Any]) -> None:
    assert saved["otherData"]["lengths"] == [64]
    title = next(e for e in saved["traceEvents"] if e["name"] == "process_name")
    assert "cp_size 2" in title["args"]["name"]


@pytest.mark.parametrize(
    "event",
    [
        {"ph": "X", "ts": 0, "pid": 0, "tid": 0, "name": "no duration"},
        {"ph": "X", "ts": -1, "dur": 2, "pid": 0, "tid": 0, "name": "before the start"},
        {"ph": "B", "ts": 0, "pid": 0, "tid": 0, "name": "begins and never ends"},
        {"ph": "X", "ts": 0, "dur": 1, "pid": 0, "tid": 7, "name": "a rank without a name"},
        {"ph": "M", "pid": 0, "tid": 0, "name": "thread_name", "args": {}},
    ],
)
def test_a_broken_trace_is_detected(saved: dict[str, Any], event: dict[str, Any]) -> None:
    saved["traceEvents"].append(event)
    assert problems(saved)
