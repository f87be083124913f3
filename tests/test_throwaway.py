"""Throw-away ranks: each mistake has its symptom, and nothing outlives the lab."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cpkit import failures
from cpkit.notebook import throwaway
from cpkit.notebook.throwaway import CASES, SYMPTOMS, throw_away
from tests.processes import left_after, processes_with

pytestmark = [pytest.mark.workers, pytest.mark.timeout(90)]
WANTED = dict(
    zip(
        CASES,
        (
            "error after the deadline",
            "error at once",
            "slow but right",
            "slow but right",
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
    assert not left_after(10, lambda: left_behind(tmp_path))


def left_behind(home: Path) -> list[str]:
    processes = processes_with("CPKIT_SHM_DIR", home / "shm").values()
    segments = [str(path) for path in (home / "shm").iterdir()]
    return segments + [words for words in processes if "cpkit.failures" in words]


def test_both_sides_know_the_same_cases() -> None:
    assert tuple(failures.CASES) == CASES
    assert set(WANTED.values()) == set(SYMPTOMS) - {"none"}


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_its_symptom(case: str) -> None:
    card = throw_away(case)
    assert card.symptom == WANTED[case], str(card)
    assert [rank.rank for rank in card.ranks] == [0, 1]


def test_the_victim_is_named_by_those_who_wait() -> None:
    card = throw_away("a_rank_dies", size=3, victim=2)
    assert [rank.exit_code for rank in card.ranks] == [1, 1, -signal.SIGKILL]
    for rank in card.ranks[:2]:
        assert rank.error == "BarrierTimeout"
        assert "for rank(s) 2 at barrier" in rank.said
    assert "killed by SIGKILL" in card._repr_html_()


def test_a_receive_buffer_alone_is_judged_by_version() -> None:
    for rank in throw_away("receive_only").ranks:
        assert rank.paths == {
            "posix": "symmetric",
            "nccl 2.28.9": "fallback",
            "nccl 2.29.7": "symmetric",
        }


def test_a_rank_that_hangs_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throwaway, "_TIMEOUT_S", 6.0)
    card = throw_away("skips_the_rendezvous", deadline_s=60.0)
    assert card.ranks[0].exit_code == -signal.SIGKILL
    assert "did not end in time" in card.ranks[0].said


def test_ranks_end_with_the_process_that_started_them() -> None:
    code = (
        "from cpkit.notebook.throwaway import throw_away\n"
        "throw_away('skips_the_rendezvous', deadline_s=60.0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) as owner:
        parent = psutil.Process(owner.pid)
        while len(parent.children()) < 2:
            time.sleep(0.05)
        ranks = parent.children()
        time.sleep(2)  # they are in the middle of it
        owner.kill()
    psutil.wait_procs(ranks, timeout=10)
    assert not [rank for rank in ranks if rank.is_running()]


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="case is 'fire'; it must be one of skips_the_rendezvous"):
        throw_away("fire")
    with pytest.raises(ValueError, match="victim is 0; it must be one of ranks 1 to 1"):
        throw_away("a_rank_dies", victim=0)
