"""Results: joining the parts of all ranks, statistics over times, and the exported timeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cpkit.control.messages import (
    Array,
    ClockResult,
    GatherResult,
    PutResult,
    Sample,
    StageArray,
    SweepResult,
    TraceResult,
    Workload,
)
from cpkit.timing import CALL_TIME, DEVICE_TIME, Span, Timing, percentile

WORKLOAD = Workload(2, (8,))


def sample(time_us: float, clock: str = CALL_TIME, **stage_us: float) -> Sample:
    stages = {name: (us,) for name, us in stage_us.items()}
    return Sample(
        *(WORKLOAD, 3, 7, clock, (time_us,), (1.0,), (time_us + 1,), (50.0,)),
        *(stages, "staged", "why"),
    )


def test_a_sample_has_the_times_of_all_ranks() -> None:
    whole = Sample.of_all_ranks([sample(4.0, wire=2.0), sample(6.0, wire=3.0, pad=1.0)])
    assert whole.per_rank_us == (4.0, 6.0)
    assert whole.stage_us == {"wire": (2.0, 3.0), "pad": (0.0, 1.0)}
    assert (whole.time_us, whole.min_us, whole.p95_us) == (6.0, 1.0, 7.0)
    assert (whole.sequence, whole.iterations, whole.path) == (3, 7, "staged")
    sweep = SweepResult.of_all_ranks([SweepResult((sample(4.0),)), SweepResult((sample(6.0),))])
    assert sweep.table.loc[0, ["time_us", "p95_us"]].tolist() == [6.0, 7.0]


def test_a_gather_has_the_rows_of_all_ranks() -> None:
    array = Array.of(np.zeros((2, 4), dtype=np.int64))
    parts = [
        GatherResult(
            *(WORKLOAD, 1, (4, 4), 4, 16, "symmetric", "", CALL_TIME, (5.0,)),
            (StageArray("wire", rank, array),),
        )
        for rank in range(2)
    ]
    whole = GatherResult.of_all_ranks(parts)
    assert whole.checked_rows == 32
    assert whole.stage("wire", 1).shape == (2, 4)
    assert whole.table["time_us"].tolist() == [5.0, 5.0]


@pytest.mark.parametrize(("spans_hosts", "first_ns"), [(False, [0, 200]), (True, [0, 0])])
def test_ranks_of_different_machines_start_at_zero(spans_hosts: bool, first_ns: list[int]) -> None:
    parts = [
        TraceResult(WORKLOAD, ((Span("wire", start_ns, start_ns + 50),),), spans_hosts)
        for start_ns in (1_000, 1_200)
    ]
    whole = TraceResult.of_all_ranks(parts)
    assert [spans[0].start_ns for spans in whole.spans] == first_ns
    assert whole.table["duration_us"].tolist() == [0.05, 0.05]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_clock_starts_with_the_first_rank(on_gpu: bool) -> None:
    parts = [
        ClockResult(
            *(WORKLOAD, ("direct",), Array.of(np.array([[[[start_us, start_us + 5.0]]]]))),
            Array.of(np.full((1, int(on_gpu), 1), start_us / 1e3)),
        )
        for start_us in (1_000.0, 1_002.0)
    ]
    whole = ClockResult.of_all_ranks(parts)
    assert whole.begin_us("direct").tolist() == [[0.0, 2.0]]
    assert whole.times_us("direct").tolist() == [[5.0, 5.0]]
    assert whole.device_us("direct").tolist() == ([[1.0, 1.002]] if on_gpu else [])
    assert whole.table.get("device_us", [None])[0] == (1.002 if on_gpu else None)
    names = ClockResult.numbered(["direct", "copy", "direct", "direct"])
    assert names == ("direct", "copy", "direct#2", "direct#3")


def test_counts_are_added_and_reads_form_a_matrix() -> None:
    parts = [
        PutResult(2, 9, True, 18, rank, 0, Array.of(np.array([[9, 1 << 32 | 9]])), (0,), (64,), ())
        for rank in range(2)
    ]
    whole = PutResult.of_all_ranks(parts)
    assert (whole.reads, whole.stale) == (36, 1)
    assert whole.matrix.tolist() == [[9, 9], [9, 9]]
    assert whole.writers.tolist() == [[0, 1], [0, 1]]
    assert whole.addresses == (64, 64)


def test_statistics() -> None:
    assert [percentile(range(101), percent) for percent in (0, 50, 95, 100)] == [0, 50, 95, 100]
    assert percentile([3.0], 95) == 3.0
    timing = Timing()
    for time_us in (9.0, 1.0, 5.0):
        timing.call_us.append(time_us)
        timing.add_stages({"wire": time_us / 2})
    assert (timing.clock, timing.median_us) == (CALL_TIME, 5.0)
    assert timing.stage_medians_us() == {"wire": 2.5}
    timing.device_us.append(2.0)
    assert (timing.clock, timing.median_us, timing.median_call_us) == (DEVICE_TIME, 2.0, 5.0)


def test_a_sample_on_a_gpu_is_compared_by_device_time_and_says_who_is_slow() -> None:
    eager, large = sample(10.0, DEVICE_TIME), sample(40.0, DEVICE_TIME)  # both calls take 50 us
    assert (eager.host_bound, large.host_bound, sample(10.0).host_bound) == (True, False, False)
    assert "device time 10 µs" in eager.summary()
    assert "call time 50 µs, most of it on the host" in eager.summary()
    assert large.summary().endswith("call time 50 µs")
    table = SweepResult((eager, large)).table
    assert table["clock"].unique().tolist() == [DEVICE_TIME]
    assert table[["time_us", "call_us", "host_bound"]].values.tolist() == [
        [10.0, 50.0, True],
        [40.0, 50.0, False],
    ]


def test_the_saved_timeline_is_in_chromes_trace_format(tmp_path: Path) -> None:
    """Every track of a rank has a name, and every stage has a start and a duration in µs."""
    spans = (
        (Span("agree", 0, 10_500), Span("wire", 10_500, 50_250)),
        (Span("agree", 1_250, 11_000),),
    )
    TraceResult(WORKLOAD, spans).save_chrome_trace(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    title, *events = saved["traceEvents"]
    assert (title["ph"], title["name"]) == ("M", "process_name")
    assert "cp_size 2" in title["args"]["name"]
    assert saved["otherData"]["lengths"] == [8]
    assert {event["pid"] for event in saved["traceEvents"]} == {0}
    shown = [(e["ph"], e["tid"], e["name"], e.get("ts"), e.get("dur")) for e in events]
    assert shown == [
        ("M", 0, "thread_name", None, None),
        ("X", 0, "agree", 0.0, 10.5),
        ("X", 0, "wire", 10.5, 39.75),
        ("M", 1, "thread_name", None, None),
        ("X", 1, "agree", 1.25, 9.75),
    ]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 0", "rank 1"]
