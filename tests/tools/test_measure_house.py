"""`tools.measure_house` counts the sizes that it prints."""

from __future__ import annotations

import pytest

from tools import measure_house


def test_the_size_of_several_paths_is_the_sum() -> None:
    modules, lines = measure_house.size_of(["cpkit/sync", "cpkit/layout.py"])
    parts = [measure_house.size_of([path]) for path in ("cpkit/sync", "cpkit/layout.py")]
    assert (modules, lines) == tuple(map(sum, zip(*parts, strict=True)))
    assert parts[1][0] == 1


def test_ranks_that_fail_are_an_error_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("the ranks failed (exit 1)")

    monkeypatch.setattr(measure_house, "entered_by_a_gather", fail)
    assert measure_house.main([]) == 1
    shown = capsys.readouterr()
    assert "CPKIT_* variables: " in shown.out
    assert "the gather was not measured: the ranks failed" in shown.err


@pytest.mark.workers
def test_one_gather_stays_in_few_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_house.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    for line in shown[-2:]:
        algorithm, files, functions, _ = line.split()
        assert algorithm in measure_house.ALGORITHMS
        assert 5 < int(files) <= 12, line
        assert 20 < int(functions) <= 60, line
