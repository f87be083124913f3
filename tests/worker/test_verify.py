"""A request checks its own gather: one wrong bit anywhere is detected and explained."""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest
import torch
from msgspec.structs import replace

from cpkit import provenance, stages
from cpkit.control.messages import Measure, Progress, Sweep, SweepResult, Workload
from cpkit.memory.path import PathReport
from cpkit.worker import measure
from cpkit.worker.operation import CHUNK_S, SHORT_S, RankState
from cpkit.worker.workload import DTYPES, Run
from tests.helpers.drawn import sample

WORKLOAD = Workload(2, (9, 6), heads=2, head_dim=5, tensors=2)


class FixedRun(Run):
    """A run whose gather returns given tensors."""

    def gather(self) -> list[torch.Tensor]:
        return self.tensors


def gathered(dtype: str, round_number: int = 3) -> FixedRun:
    layout = WORKLOAD.layout()
    tensors = [
        provenance.expected_rows(layout, (2, 5), DTYPES[dtype], round=round_number, tensor=number)
        for number in range(2)
    ]
    return FixedRun(WORKLOAD, layout, None, 3, tensors)  # type: ignore[arg-type]  # unused


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_gather_passes_and_one_wrong_bit_fails(dtype: str) -> None:
    run = gathered(dtype)
    assert run.verified_gather() is run.tensors
    for tensor in run.tensors:
        last_byte = tensor.view(torch.uint8).reshape(-1)[-1:]
        last_byte ^= 1
        with pytest.raises(provenance.ProvenanceError, match=r"(?s)slot 14 .*1 of 15 rows differ"):
            run.verified_gather()
        last_byte ^= 1
    assert run.verified_gather()


def test_rows_of_an_earlier_round_are_detected() -> None:
    with pytest.raises(provenance.ProvenanceError, match=r"holds round 2.*expected round 3"):
        gathered("bfloat16", round_number=2).verified_gather()


def test_swapped_tensors_are_detected() -> None:
    run = gathered("float32")
    run.tensors.reverse()
    with pytest.raises(provenance.ProvenanceError, match="tensor 1"):
        run.verified_gather()


class GroupOfOne:
    """A group that exchanges with itself."""

    def exchange(self, mine: bytes) -> list[bytes]:
        return [mine]

    def barrier(self) -> None:
        pass


def test_a_measurement_verifies_every_algorithm_before_it_times_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long verifications end the step, so that the request can be cancelled between them."""
    runs = [gathered("bfloat16") for _ in range(3)]
    right = runs[0].verified_gather
    monkeypatch.setattr(runs[0], "verified_gather", lambda: (time.sleep(CHUNK_S), right()))
    monkeypatch.setattr(measure, "_variants", lambda *_: runs)
    monkeypatch.setattr(FixedRun, "path", lambda _: None)
    monkeypatch.setattr(measure, "time_calls", lambda *_, **__: pytest.fail("timed before"))
    runs[2].tensors[1].view(torch.uint8)[-1] ^= 1
    operation = measure.MeasureOperation(Measure((WORKLOAD,) * 3))
    steps = operation.steps(GroupOfOne(), RankState())  # type: ignore[arg-type]
    assert next(steps) == Progress(1, 3, "algorithms verified")
    with pytest.raises(provenance.ProvenanceError, match="tensor 1"):
        next(steps)


def test_a_stream_waits_longer_after_its_first_sample() -> None:
    """A page then draws the new setting and needs the cores. A request has no page to wait for."""
    lab = measure.MeasureOperation(Measure((WORKLOAD,), samples=3, interval_s=0.1))
    stream = measure.MeasureOperation(Measure((WORKLOAD,), interval_s=0.1))
    reports = [SweepResult((replace(sample(), sequence=number),)) for number in range(2)]
    assert [stream.interval_s(each) for each in reports] == [0.2, 0.1]
    rare = measure.MeasureOperation(Measure((WORKLOAD,), interval_s=60.0))
    assert rare.interval_s(reports[0]) < 61, "a client waits 33 s longer than the interval"
    assert [lab.interval_s(each) for each in reports] == [0.1, 0.1]
    assert stream.interval_s(Progress(1, 2, "algorithms verified")) == 0


def test_a_step_of_long_gathers_is_one_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a request of several algorithms delays other clients by a whole round."""
    runs = [gathered("bfloat16") for _ in range(3)]
    monkeypatch.setattr(measure, "_variants", lambda *_: runs)
    monkeypatch.setattr(measure, "_verified", lambda *_: iter(()))
    monkeypatch.setattr(measure, "_streamed", lambda *_: Progress(3, 3, "a sample"))
    calls = [0]

    def gather(_: FixedRun) -> None:
        calls[0] += 1
        time.sleep(1.1 * CHUNK_S)

    monkeypatch.setattr(FixedRun, "gather", gather)
    steps = measure.MeasureOperation(Measure((WORKLOAD,) * 3)).steps(GroupOfOne(), RankState())  # type: ignore[arg-type]
    for number in range(1, 7):
        expected = "a sample" if number % 3 == 0 else "timed in this round"
        assert next(steps).text == expected
        assert calls[0] == number


@pytest.mark.parametrize("is_short", [True, False])
def test_a_sweep_times_no_cold_gather_and_repeats_short_ones_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, *, is_short: bool
) -> None:
    def verified(*_: object) -> Generator[Progress, None, list[PathReport]]:
        yield from ()
        return [PathReport("symmetric", "", "", "")] * 2

    def gather(_: FixedRun) -> None:
        calls[0] += 1
        time.sleep(took_s * (3 if calls[0] <= 2 else 1))

    calls, took_s = [0], 0.6 * (CHUNK_S if is_short else SHORT_S)
    runs = [gathered("bfloat16") for _ in range(2)]
    monkeypatch.setattr(measure, "_variants", lambda *_: runs)
    monkeypatch.setattr(measure, "_verified", verified)
    monkeypatch.setattr(FixedRun, "gather", gather)
    steps = measure.SweepOperation(Sweep((WORKLOAD,) * 2, 2)).steps(GroupOfOne(), RankState())  # type: ignore[arg-type]
    assert [next(steps), next(steps)] == [Progress(n, 2, "iterations") for n in range(2)]
    with pytest.raises(StopIteration) as end:
        next(steps)
    for row in end.value.value.rows:
        assert row.iterations == 2
        assert row.per_rank_p95_us[0] < 2e6 * took_s
    assert calls[0] == 2 * (1 + 2 + 2 * is_short), "cold, timed, and after each of two pauses"


def test_a_stream_records_stages_in_a_few_gathers_of_every_fourth_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recorded gathers take longer, and delay the page and other clients."""
    recorded: list[bool] = []

    def gather(_: FixedRun) -> None:
        recorded.append(stages.is_observed())
        with stages.stage("wire"):
            time.sleep(1e-4)

    monkeypatch.setattr(measure, "_variants", lambda *_: [gathered("bfloat16")])
    monkeypatch.setattr(measure, "_verified", lambda *_: iter([]))
    monkeypatch.setattr(measure, "_streamed", lambda *args: args[2])
    monkeypatch.setattr(measure, "_path", lambda *_: None)
    monkeypatch.setattr(FixedRun, "gather", gather)
    steps = measure.MeasureOperation(Measure((WORKLOAD,))).steps(GroupOfOne(), RankState())  # type: ignore[arg-type]
    counts = []
    for _ in range(9):
        timing = next(steps)["0"]  # type: ignore[index]
        assert timing.stages_us["wire"], "every sample has stages"
        counts.append((sum(recorded), len(recorded) - sum(recorded)))
        recorded.clear()
    assert [bool(n) for n, _ in counts] == [True] * 2 + [False] * 3 + [True] + [False] * 3
    assert all(n <= times / 3 for n, times in counts[1:])
