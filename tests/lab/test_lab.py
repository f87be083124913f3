"""Every operation of a `Lab` on four real ranks."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpkit.algorithms import ALGORITHMS
from cpkit.lab import Lab
from cpkit.layout import STRATEGIES, prepare_context_parallel_metadata

pytestmark = [pytest.mark.workers, pytest.mark.usefixtures("the_workers_stay_usable")]


def test_status_describes_the_ranks(lab: Lab) -> None:
    status = lab.status()
    assert (status.world_size, status.cp_sizes, status.device) == (4, (1, 2, 4), "cpu")
    assert status.cores >= 1
    assert status.gpus == 0
    assert status.load >= 0
    assert lab.cp_sizes == (1, 2, 4)
    assert lab.owned
    assert list(status.table["rank"]) == [0, 1, 2, 3]
    assert all(Path(log).is_file() for log in status.table["log"])
    assert status.log_dir in repr(status)
    assert "<table" in status._repr_html_()


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gathers_are_verified_and_shown_by_every_algorithm(
    lab: Lab, cp_size: int, strategy: str
) -> None:
    layout = prepare_context_parallel_metadata([11, 16, 9], cp_size, strategy)
    for algorithm in ALGORITHMS:
        got = lab.gather(
            [11, 16, 9], cp_size, strategy=strategy, algorithm=algorithm, round=7, head_dim=16
        )
        assert got.verified
        assert got.checked_rows == 36 * 2 * cp_size
        assert got.per_rank_actual_token == layout.per_rank_actual_token
        assert got.max_rank_len == layout.max_rank_len[0]
        assert len(got.per_rank_us) == cp_size
        shard = got.stage("shard", cp_size - 1)
        last = got.stage(got.stages[-1], 0)
        assert (shard[:, :2] == (7, cp_size - 1)).all()
        assert np.array_equal(last[:, 1], layout.owners().numpy())
        assert list(last[:, 3]) == [*range(11), *range(16), *range(9)]


def test_a_plan_is_accepted_wherever_an_algorithm_is(lab: Lab) -> None:
    got = lab.gather([13, 9], 4, algorithm="plan")
    assert got.verified
    assert got.path == "symmetric"
    assert got.stages == ("shard", "wire")
    assert lab.gather([13, 9], 4, algorithm="plan", symmetric=False).path == "fallback"
    (sample,) = lab.measure(64, 2, algorithm="plan", samples=1)
    assert set(sample.stage_us) == {"wire", "exit"}
    assert set(lab.trace(64, 2, algorithm="plan").table["stage"]) == {"wire", "exit"}
    table = lab.sweep(lengths=[64], algorithms=["direct", "plan"], iterations=3)
    assert list(table["algorithm"]) == ["direct", "plan"]
    assert set(lab.explain(64, 2, algorithm="plan")["path"]) == {"symmetric"}
    assert lab.clock(["plan"], 64, 2, iterations=2, warmup=0).times_us("plan").shape == (2, 2)


@pytest.mark.parametrize("method", ["gather", "measure", "sweep", "clock", "trace", "explain"])
def test_signatures_show_every_parameter_its_values_and_its_default(method: str) -> None:
    signature = inspect.signature(getattr(Lab, method))
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    shown = str(signature)
    assert f"strategy: Literal{list(STRATEGIES)} = 'zigzag'" in shown
    assert "'direct', 'plan'" in shown
    assert "heads: int = 8, head_dim: int = 128" in shown


def test_the_stages_of_the_padded_gather_show_padding_and_order(lab: Lab) -> None:
    got = lab.gather([10], 4, algorithm="padded", strategy="contiguous")
    assert got.stages == ("shard", "pad", "wire", "strip", "reorder")
    assert got.per_rank_actual_token == (2, 3, 2, 3)
    wire = got.stage("wire", 2)
    assert wire.shape == (12, 4)
    assert [int(row[1]) for row in wire] == [0, 0, -1, 1, 1, 1, 2, 2, -1, 3, 3, 3]
    assert got.stage("strip", 2).shape == (10, 4)
    assert got.path == "fallback"
    with pytest.raises(ValueError, match=r"no stage 'exit'.*shard, pad"):
        got.stage("exit", 0)


def test_large_gathers_have_no_arrays_but_are_verified(lab: Lab) -> None:
    got = lab.gather(20_000, 2, heads=1, head_dim=8)
    assert got.stages == ()
    assert got.checked_rows == 20_000 * 2 * 2
    with pytest.raises(ValueError, match="too many"):
        got.stage("shard", 0)


def test_without_symmetric_memory_the_path_has_the_reason(lab: Lab) -> None:
    got = lab.gather([40], 4, symmetric=False)
    assert got.path == "fallback"
    assert "is_allocation_symmetric" in got.path_reason
    table = lab.explain([40], 4)
    assert list(table.columns) == ["rank", "path", "reason", "send", "recv"]
    assert set(table["path"]) == {"symmetric"}


def test_on_the_cpu_there_is_nothing_to_observe_and_the_reason_is_given(lab: Lab) -> None:
    table = lab.explain([40], 2, algorithm="padded_symm", observe=True)
    assert list(table.columns) == ["rank", "path", "reason", "send", "recv", "observed"]
    assert len(table) == 2
    assert set(table["observed"]) == {"nothing observed: the ranks are on the CPU, without NCCL"}


def test_measuring_streams_samples_at_its_interval(lab: Lab) -> None:
    started = time.monotonic()
    samples = list(lab.measure([512], 2, samples=4, interval_s=0.1))
    assert [sample.sequence for sample in samples] == [0, 1, 2, 3]
    assert time.monotonic() - started >= 0.3
    for sample in samples:
        assert len(sample.per_rank_us) == 2
        assert all(
            0 < least <= middle <= p95
            for least, middle, p95 in zip(
                sample.per_rank_min_us, sample.per_rank_us, sample.per_rank_p95_us, strict=True
            )
        )
        assert {"agree", "wire", "exit"} <= sample.stage_us.keys()
        assert sample.total_bytes == 512 * 8 * 128 * 2 * 2


def test_several_algorithms_are_interleaved_in_one_measurement(lab: Lab) -> None:
    names = ("padded", "plan", "direct")
    samples = list(lab.measure([512], 4, algorithms=names, samples=3, interval_s=0.05))
    assert [s.algorithm for s in samples] == list(names) * 3, "one sample each per interval"
    assert [s.sequence for s in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {s.algorithm: s.path for s in samples} == {
        "padded": "fallback",
        "plan": "symmetric",
        "direct": "symmetric",
    }
    for interval in (samples[:3], samples[3:6], samples[6:]):
        assert len({len(s.gathers_us) for s in interval}) == 1, "they have the same rounds"
    for each in samples:
        assert len(each.gathers_us) == each.iterations >= 1
        assert min(each.gathers_us) >= each.min_us, "a gather is as slow as its slowest rank"
        assert np.median(each.gathers_us) >= each.time_us


def test_one_measurement_compares_symmetric_with_ordinary_memory(lab: Lab) -> None:
    workloads = [lab.workload(512, symmetric=symmetric) for symmetric in (True, False)]
    samples = lab.measure_workloads(workloads, samples=2, interval_s=0.05)
    assert [sample.path for sample in samples] == ["symmetric", "fallback"] * 2


def test_sweep_has_nccl_tests_columns_and_one_row_per_workload(lab: Lab) -> None:
    table = lab.sweep(sizes_bytes=[1 << 14, 1 << 16], cp_sizes=[2, 4], iterations=3)
    assert len(table) == 2 * 2 * len(ALGORITHMS)
    assert list(table.columns[:4]) == ["size_bytes", "count", "type", "algorithm"]
    assert list(table["algorithm"][: len(ALGORITHMS)]) == list(ALGORITHMS)
    assert set(table["cp_size"]) == {2, 4}
    assert (table["iterations"] == 3).all()
    assert (table["size_bytes"] >= 1 << 14).all()
    expected = table["size_bytes"] / table["time_us"] / 1e3
    assert np.allclose(table["algbw_gbps"], expected)
    assert np.allclose(table["busbw_gbps"], expected * (table["cp_size"] - 1) / table["cp_size"])


def test_long_calls_report_their_progress(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpkit.control.client._PROGRESS_S", 0.0)
    lines: list[object] = []
    what: dict[str, Any] = {"algorithms": ["direct"], "on_progress": lines.append}
    lab.sweep(sizes_bytes=[1 << 15, 1 << 16], iterations=3, **what)
    shown = [str(line) for line in lines]
    assert shown[0] == "0 of 2 rows; now: 32768 bytes, cp_size 4, 0 of 3 iterations"
    assert shown[-1].startswith("1 of 2 rows; now: 65536 bytes, cp_size 4, ")
    lines.clear()
    # Each iteration is longer than a step, because rank 3 begins 60 ms late.
    lab.clock(["direct"], [64], 4, iterations=3, late_us=20_000, on_progress=lines.append)
    shown = [str(line) for line in lines]
    assert shown[0] == "1 of 1 algorithms verified"
    assert shown[-2:] == ["1 of 3 iterations", "2 of 3 iterations"]


def test_trace_puts_all_ranks_on_one_clock(lab: Lab) -> None:
    table = lab.trace([64], 4, algorithm="padded_symm").table
    assert set(table["rank"]) == {0, 1, 2, 3}
    assert {"agree", "pad", "wire", "exit", "strip", "reorder"} == set(table["stage"])
    assert table["start_us"].min() == 0
    assert (table["duration_us"] > 0).all()
    # No rank leaves the exit barrier before all ranks have sent their rows.
    exits, wires = (table[table["stage"] == stage] for stage in ("exit", "wire"))
    assert exits["stop_us"].min() >= wires["stop_us"].max() - 1


def test_the_clock_returns_every_sample_of_every_rank(lab: Lab) -> None:
    timed = lab.clock(["direct", "barrier", "direct"], [64], 4, iterations=5)
    assert timed.calls == ("direct", "barrier", "direct#2")
    assert timed.times_us("direct").shape == (5, 4)
    assert (timed.times_us("barrier") > 0).all()
    starts = [timed.begin_us(call) for call in timed.calls]
    for earlier, later in zip(starts, [*starts[1:], starts[0][1:]], strict=True):
        assert (earlier[: len(later)] < later).all(), "interleaved: A B A, A B A, …"
    table = timed.table.set_index("call")
    assert (table["min_us"] <= table["time_us"]).all()
    assert (table["time_us"] <= table["p95_us"]).all()
    assert table.loc["direct", "time_us"] == np.median(timed.times_us("direct").max(axis=1))


def test_without_the_barrier_the_clock_counts_waiting(lab: Lab) -> None:
    """The first rank waits inside its clock for the rank that starts 3 · 60 ms later."""
    fair, unfair = (
        lab.clock(["direct"], [64], 4, iterations=3, late_us=60_000, barrier=barrier)
        for barrier in (True, False)
    )
    late_us = 3 * 60_000
    first, last = unfair.begin_us("direct").min(axis=1), unfair.begin_us("direct").max(axis=1)
    assert (last - first > 0.9 * late_us).all()
    assert unfair.times_us("direct")[:, 0].min() > 0.8 * late_us
    assert np.median(fair.times_us("direct")[:, 0]) < 0.5 * late_us


def test_a_call_that_is_only_launched_looks_fast(lab: Lab) -> None:
    timed = lab.clock(["collective", "launch"], [8192], 4, iterations=5)
    quickest = timed.table.set_index("call")["min_us"]
    assert quickest["launch"] < quickest["collective"] / 2


def test_a_cold_clock_starts_with_the_first_call(lab: Lab) -> None:
    lab.pool.configure(64 << 20, 4)
    cold = lab.clock(["direct", "copy", "copy_fresh"], [64], 4, iterations=2, warmup=0)
    assert len(cold.slowest_us("direct")) == 2
    with pytest.raises(ValueError, match="'padded' was not timed; use one of direct, copy"):
        cold.times_us("padded")


def test_the_pool_fills_spills_and_is_warmed_up(lab: Lab) -> None:
    fresh = lab.pool.configure(4 << 20, 2)
    assert list(fresh["rank"]) == [0, 1]
    assert "warm_up()" in repr(lab.pool)
    assert (fresh["arena_bytes"] == 4 << 20).all()
    fits = lab.pool.allocate(1 << 20, 2)
    assert fits.attrs["note"] == "fit the pool"
    assert (fits["used_bytes"] >= 1 << 20).all()
    spilled = lab.pool.allocate(8 << 20, 2)
    assert "spilled" in spilled.attrs["note"]
    assert (spilled["spills"] == 1).all()
    released = lab.pool.release(2)
    assert "2 block" in released.attrs["note"]
    assert (released["used_bytes"] == 0).all()
    warm = lab.pool.warm_up(4096, 2)
    assert (warm["segments"] == 1).all(), "no block is held, so one arena replaces the segments"
    assert (warm["arena_bytes"] > 12 << 20).all()
    assert "the arena has" in warm.attrs["note"]
    assert lab.gather(4096, 2).verified
    assert (lab.pool.stats(2)["spills"] == 1).all(), "a gather within the warmed-up size spilled"
    lab.pool.configure(None, 2)


def test_put_is_safe_with_a_barrier_and_stale_without(lab: Lab) -> None:
    safe = lab.put(4, rounds=700)
    assert (safe.stale, safe.ahead) == (0, 0)
    assert safe.reads == 700 * 4 * 4
    assert (safe.matrix == 700).all()
    assert (safe.writers == [0, 1, 2, 3]).all()
    assert len(set(safe.offsets)) == 1, "symmetric: one offset on all ranks"
    hasty = lab.put(4, rounds=2000, barrier=False)
    assert hasty.stale > 0
    assert hasty.examples
