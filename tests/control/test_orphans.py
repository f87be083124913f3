"""No process outlives the one that started it, however early that is killed.

The risk is the time between `Popen` and the child's first instruction that ties it to its parent.
Therefore each owner kills itself at a given delay after its last `Popen`, from 0 s on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

import psutil
import pytest

import cpkit
from cpkit.control import launcher
from cpkit.control.launch_options import Launch
from cpkit.control.runtime_dir import RuntimeDir
from cpkit.control.tied import PARENT_GONE_CODE, tied
from cpkit.processes import process_id
from tests.helpers.processes import processes_with, until

pytestmark = pytest.mark.workers
DELAYS_S = (0.0, 0.03, 0.1, 0.5, 2.0)
MARK = "CPKIT_TEST_OWNER"
OWNER = """
import os, signal, subprocess, sys, time
popens, delay_s = int(sys.argv[1]), float(sys.argv[2])
class Popen(subprocess.Popen):
    count = 0
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Popen.count += 1
        if Popen.count == popens:
            time.sleep(delay_s)
            os.kill(os.getpid(), signal.SIGKILL)
subprocess.Popen = Popen
"""
FAILURE_LAB = """
from cpkit_lessons.failure_lab import inject_fault
inject_fault("skips_the_rendezvous", deadline_s=60.0)
"""
CONNECT = """
import cpkit
cpkit.connect(f"orphans-{delay_s}", nproc=2)
"""
LAB = """
from cpkit import __main__ as command
command.launcher.running = lambda *_: None  # for `attach`
command.readiness.running = lambda name: None
command._start = lambda settings: "JupyterLab is meant here; test_worker_faults.py has the workers"
command.main(["lab", "--no-browser", "--port=0"])
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Mark the environment of every process that the test starts, and kill those that remain."""
    word = uuid.uuid4().hex
    monkeypatch.setenv(MARK, word)
    yield word
    for process in processes_with(MARK, word):
        process.kill()


_REPEATS = pytest.mark.slow("the same for other processes that an owner starts")


@pytest.mark.parametrize(
    ("code", "popens"),
    [
        pytest.param(FAILURE_LAB, 2, id="failure lab", marks=_REPEATS),
        pytest.param(CONNECT, 1, id="agent and ranks"),
        pytest.param(LAB, 1, id="JupyterLab", marks=_REPEATS),
    ],
)
def test_a_killed_owner_leaves_no_process(
    runtime_dir: object, mark: str, code: str, popens: int
) -> None:
    command = [sys.executable, "-c", OWNER + code, str(popens)]
    owners = [
        subprocess.Popen([*command, str(delay_s)], stdout=subprocess.DEVNULL)
        for delay_s in DELAYS_S
    ]
    assert [owner.wait(60) for owner in owners] == [-signal.SIGKILL] * len(DELAYS_S)
    # 30 s is less than the deadline of a throw-away rank, which would end it in any case.
    until(lambda: not processes_with(MARK, mark), 30, lambda: str(processes_with(MARK, mark)))


def test_a_killed_agent_leaves_no_rank_and_the_next_agent_is_unharmed(
    runtime_dir: object, mark: str
) -> None:
    """Ranks that are still importing torch must not take the next agent for theirs."""
    agent = launcher.start(Launch(name="early", nproc=2, owner=process_id()))
    parent = psutil.Process(agent.pid)
    until(lambda: len(parent.children()) == 2, 60, "the agent to start two ranks")
    ranks = parent.children()
    agent.kill()
    agent.wait()
    with cpkit.connect("early", nproc=2) as lab:
        until(lambda: not any(rank.is_running() for rank in ranks), 30, "the first ranks to end")
        assert lab.gather([64], 2).verified
        lab.stop()


@pytest.mark.slow("waits for a start that hangs")
def test_a_start_that_hangs_is_stopped_and_reports_its_phase(
    runtime_dir: object, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agent and ranks are suspended, so that SIGTERM has no effect and only SIGKILL ends them."""
    settings = Launch(name="stuck", nproc=2, owner=process_id())
    agent = launcher.start(settings)
    phases = RuntimeDir("stuck").startup_phases
    until(lambda: {"rank 0", "rank 1"} <= phases().keys(), why=lambda: str(phases()))
    for process in processes_with(MARK, mark):
        process.suspend()
    monkeypatch.setattr("cpkit.control.readiness.READY_S", 1.0)
    for limit in ("_STOP_TIMEOUT_S", "_EXIT_TIMEOUT_S"):
        monkeypatch.setattr(launcher, limit, 1.0)
    with pytest.raises(cpkit.NoAnswer, match=r"rank 0: .*, rank 1: .*agent\.log"):
        launcher.wait_until_ready(agent, settings)
    assert not processes_with(MARK, mark)


def test_a_command_whose_parent_has_ended_is_not_run(capfd: pytest.CaptureFixture[str]) -> None:
    command = tied(["echo", "it ran"])
    assert subprocess.run(command, check=False).returncode == 0
    command[command.index(str(os.getpid()))] = "1"
    assert subprocess.run(command, check=False).returncode == PARENT_GONE_CODE
    assert capfd.readouterr().out == "it ran\n"
