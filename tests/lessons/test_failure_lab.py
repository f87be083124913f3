"""The failure lab: each fault has its symptom, and no process or segment remains."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cpkit_lessons import failure_lab, faults
from cpkit_lessons.failure_lab import CASES, SYMPTOMS, PostMortem, inject_fault
from tests.helpers.processes import LIMIT_S, left_after, processes_with

pytestmark = pytest.mark.workers
WANTED = dict(
    zip(
        CASES,
        (
            "error after the deadline",
            "error at once",
            "fast path missed",
            "fast path missed",
            "silently wrong",
            "error at once",
            "error after the deadline",
        ),
        strict=True,
    )
)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CPKIT_SHM_DIR", str(tmp_path / "shm"))
    (tmp_path / "shm").mkdir()
    yield
    assert not left_after(LIMIT_S, lambda: left_behind(tmp_path))


def left_behind(home: Path) -> list[str]:
    processes = processes_with("CPKIT_SHM_DIR", home / "shm").values()
    segments = [str(path) for path in (home / "shm").iterdir()]
    return segments + [words for words in processes if "cpkit_lessons.faults" in words]


def test_both_modules_have_the_same_cases() -> None:
    assert tuple(faults.CASES) == CASES
    assert set(WANTED.values()) == set(SYMPTOMS) - {"none"}


@cache
def card_of(case: str) -> PostMortem:
    """Run a case once. The deadline is short only if the case waits for it."""
    waits = WANTED[case] == "error after the deadline"
    size = 3 if case == "a_rank_dies" else 2
    return inject_fault(case, size=size, victim=size - 1, deadline_s=1.5 if waits else 20.0)


ALSO_BELOW = ("a_rank_dies", "receive_only", "wrong_group")
IN_NOTEBOOK = pytest.mark.slow("test_notebooks.py runs all cases with notebook 2")


@pytest.mark.parametrize(
    "case",
    [case if case in ALSO_BELOW else pytest.param(case, marks=IN_NOTEBOOK) for case in CASES],
)
def test_a_case_has_its_symptom(case: str) -> None:
    card = card_of(case)
    assert card.symptom == WANTED[case], str(card)
    assert [rank.rank for rank in card.ranks] == list(range(len(card.ranks)))


def test_the_waiting_ranks_name_the_victim() -> None:
    card = card_of("a_rank_dies")
    assert [rank.exit_code for rank in card.ranks] == [1, 1, -signal.SIGKILL]
    for rank in card.ranks[:2]:
        assert rank.error == "BarrierTimeout"
        assert "for rank(s) 2 at barrier" in rank.message
    assert "killed by SIGKILL" in card._repr_html_()


def test_the_path_of_a_receive_buffer_alone_depends_on_the_version() -> None:
    for rank in card_of("receive_only").ranks:
        assert rank.paths == {
            "posix": "symmetric",
            "nccl 2.28.9": "fallback",
            "nccl 2.29.7": "symmetric",
        }
        assert "needs both buffers registered" in rank.observed
    for rank in card_of("wrong_group").ranks:
        assert "in the pool of another group" in rank.observed


def test_a_rank_that_hangs_is_ended_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failure_lab, "_TIMEOUT_S", 5.0)
    card = inject_fault("skips_the_rendezvous", deadline_s=60.0)
    assert card.ranks[0].exit_code == -signal.SIGKILL
    assert "did not end in time" in card.ranks[0].message
    shown = ["starting 2 ranks …", "they run; each waits at most 60 s for its peers …"]
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.slow("a second death; test_a_case_has_its_symptom has that of rank 1")
def test_rank_0_can_be_the_victim() -> None:
    card = inject_fault("a_rank_dies", victim=0)
    assert [rank.exit_code for rank in card.ranks] == [-signal.SIGKILL, 1]
    assert "for rank(s) 0 at barrier" in card.ranks[1].message


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="case is 'fire'; it must be one of skips_the_rendezvous"):
        inject_fault("fire")
    with pytest.raises(ValueError, match="victim is 2; it must be one of ranks 0 to 1"):
        inject_fault("a_rank_dies", victim=2)
