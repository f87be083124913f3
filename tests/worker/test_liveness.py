"""How long a rank has been silent, as another rank measures it."""

from __future__ import annotations

import pytest

from cpkit.worker.liveness import Silence


def test_silence_counts_until_the_counter_grows_and_not_while_the_observer_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", "30")
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    silence = Silence(2)
    for second in range(1, 11):
        now_s += 1
        assert silence.observe([second, 0]) == [0, second]
    now_s += 3600  # all ranks were stopped
    assert silence.observe([10, 0]) == [2, 12]
    now_s += 1
    assert silence.observe([10, 1]) == [3, 0]
