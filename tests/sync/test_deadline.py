"""CPKIT_DEADLINE_S: a wait must end."""

from __future__ import annotations

import pytest

from cpkit.settings import deadline_s


@pytest.mark.parametrize("chosen", ["nan", "inf", "-1", "0", "abc", "1e9"])
def test_what_is_no_time_is_refused(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", chosen)
    with pytest.raises(ValueError, match="it must be seconds"):
        deadline_s()


@pytest.mark.parametrize(("chosen", "wait_s"), [("", 30), ("0.5", 0.5), ("86400", 86400)])
def test_what_is_one_is_taken(chosen: str, wait_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", chosen)
    assert deadline_s() == wait_s
