"""Invalid numbers are refused with a message; numpy's integers are accepted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import cpkit
from cpkit.algorithms import ALGORITHMS

pytestmark = pytest.mark.workers


@pytest.mark.parametrize(
    "call",
    [
        lambda lab: next(lab.measure(64, 2, interval_s=-31.0)),
        lambda lab: next(lab.measure(64, 2, interval_s=float("nan"))),
        lambda lab: next(lab.measure(64, 2, interval_s=float("inf"))),
        lambda lab: next(lab.measure(64, 2, interval_s=1e10)),
        lambda lab: lab.gather([2**70], 2),
        lambda lab: lab.gather(64, 2, round=2**70),
        lambda lab: lab.gather(64, 2, round=-1),
        lambda lab: lab.gather(64, 2, round=1024),
        lambda lab: lab.put(2, rounds=2**70),
        lambda lab: lab.pool.configure(2**70, 2),
        lambda lab: lab.gather(64, 2, dtype="\ud800"),
        lambda lab: lab.gather([(1 << 20) + 8], 2, heads=1, head_dim=8),
        lambda lab: lab.sweep(sizes_bytes=["a"]),
        lambda lab: lab.sweep(sizes_bytes=[-5]),
        lambda lab: lab.sweep(sizes_bytes=[64], cp_sizes=["a"]),
        lambda lab: lab.gather(64, 2, algorithm="fast"),
    ],
)
def test_invalid_numbers_are_bad_requests(
    call: Callable[[cpkit.Lab], object], lab: cpkit.Lab
) -> None:
    with pytest.raises(cpkit.BadRequest):
        call(lab)
    assert lab.gather(64, 2).verified


def test_a_sweep_has_algorithms_and_no_algorithm(lab: cpkit.Lab) -> None:
    with pytest.raises(TypeError, match="'algorithm'"):
        lab.sweep(sizes_bytes=[1 << 14], algorithm="direct")  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16"])
def test_a_dtype_is_torchs_or_its_name(lab: cpkit.Lab, dtype: str | torch.dtype) -> None:
    assert lab.workload(64, 2, dtype=dtype).dtype == "bfloat16"
    assert lab.gather(64, 2, dtype=dtype).verified


def test_integers_of_numpy_are_accepted(lab: cpkit.Lab) -> None:
    assert lab.gather(np.int64(64), np.int64(2), heads=np.int64(2), round=np.int64(3)).verified
    assert len(list(lab.measure(64, samples=np.int64(2), interval_s=np.float32(0.02)))) == 2
    table = lab.sweep(
        sizes_bytes=np.array([1 << 14, 1 << 15]), cp_sizes=np.array([2]), iterations=2
    )
    assert len(table) == 2 * len(ALGORITHMS)


def test_long_work_reports_progress(lab: cpkit.Lab) -> None:
    """The work takes longer than the deadline, but replies arrive more often."""
    client = lab._client
    from cpkit.control.messages import Put, PutResult

    result = client.call(Put(4, 30_000), PutResult, deadline_s=1.5)
    assert result.stale == 0
