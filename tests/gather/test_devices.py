"""What a rank is told about its GPU."""

from __future__ import annotations

import pytest

from cpkit.devices import advice_on_idle_gpus

SHARED, ELSEWHERE = ["h0", "h0", "h1", "h1"], ["a", "a", "b", "c"]


@pytest.mark.parametrize(
    ("rank", "gpus", "n_visible", "advised"),
    [
        pytest.param(0, ELSEWHERE, 2, True, id="ranks 0 and 1 share one of two"),
        pytest.param(1, ELSEWHERE, 2, False, id="the first of them is told"),
        pytest.param(2, ELSEWHERE, 2, False, id="another machine, a GPU each"),
        pytest.param(0, ELSEWHERE, 1, False, id="there is one GPU"),
        pytest.param(0, ["a", "b", "a", "b"], 2, False, id="all GPUs are in use"),
        pytest.param(0, ["", "", "", ""], 2, False, id="on the CPU"),
    ],
)
def test_ranks_that_share_a_gpu_beside_idle_ones_are_told(
    rank: int, gpus: list[str], n_visible: int, advised: bool
) -> None:
    advice = advice_on_idle_gpus(rank, SHARED, gpus, n_visible)
    assert advice.startswith("ranks 0, 1 use one GPU, and 1 of the 2 GPUs" if advised else "")
    assert bool(advice) == advised
