"""The explorer's views of given numbers: the floor, and a pool that spilled."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cpkit.control.messages import Array, ClockResult, Workload
from cpkit.notebook import views
from cpkit.notebook.style import text_alternative


def probe(device_us: float | None = None) -> ClockResult:
    """Return a barrier of 10 and 12 µs and a copy of 80 and 100 µs, on two ranks."""
    samples = np.zeros((2, 2, 2, 2))
    samples[..., 1] = [[[10, 9], [7, 12]], [[80, 70], [100, 90]]]
    device = np.full((2, 0 if device_us is None else 2, 2), device_us or 0.0)
    return ClockResult(Workload(2, (64,)), ("barrier", "copy"), Array.of(samples), Array.of(device))


def test_the_floor_is_one_barrier_and_what_a_gather_must_move() -> None:
    assert views.floor_us(probe()) == pytest.approx(10 + 3 / 4 * 80)
    assert views.floor_us(probe(), barrier_us=4) == pytest.approx(4 + 3 / 4 * 80)
    assert views.floor_us(probe(device_us=40)) == pytest.approx(3 / 4 * 40)


def test_the_pool_names_its_peak_and_its_spills() -> None:
    columns = {"arena_bytes": 16e6, "spill_bytes": 4e6, "used_bytes": 1e6, "peak_bytes": 18e6}
    stats = pd.DataFrame(
        [{"rank": rank, "spills": 2, "spill_ms": 3.0} | columns for rank in (0, 1)]
    )
    figure = views.pool(stats)
    text = text_alternative(figure)
    assert "1 MB used, peak 18 MB, of an arena of 16 MB; 2 spills (3 ms" in text
    assert [trace["x"] for trace in figure["data"]] == [[20, 20], [1, 1], [18, 18]]
    assert "not read yet" in text_alternative(views.pool(None))
