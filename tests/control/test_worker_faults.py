"""The death of processes, in workers that each test starts; no test leaves anything behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import cpkit
from cpkit.control import launcher
from cpkit.control.launch_options import Launch
from cpkit.control.runtime_dir import PostMortem, RuntimeDir
from cpkit.processes import process_id
from tests.helpers import ROOT
from tests.helpers.leftovers import check_nothing_is_left, has_ended, pids
from tests.helpers.processes import LIMIT_S, until

pytestmark = pytest.mark.workers
SCRIPT = ROOT / "launch_workers.sh"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(runtime_dir: Path) -> Iterator[None]:
    """After each test, no new process, segment, socket or connection file remains."""
    yield from check_nothing_is_left(runtime_dir)


def test_a_killed_worker_is_named_and_connect_works_again(runtime_dir: Path) -> None:
    """The error is WorkersDied, and not NoAnswer, which would mean that a deadline passed.

    It has the exit code even if the agent is stopped, because a client continues the agent.
    """
    for victim in (1, 0):
        with cpkit.connect("victims", nproc=2) as lab:
            assert lab.gather([64], 2).verified
            with Path(lab.status().workers[victim].log).open("a") as log:
                log.write("the last line of this rank\n")
            samples = lab.measure([1024], 2)
            next(samples)
            if victim == 0:
                os.kill(RuntimeDir("victims").agent().process.pid, signal.SIGSTOP)
            os.kill(pids(lab)[victim], signal.SIGKILL)
            with pytest.raises(cpkit.WorkersDied) as caught:
                deque(samples, maxlen=0)
            assert caught.value.rank == victim
            assert caught.value.exit_code == -signal.SIGKILL
            assert caught.value.log_lines[-1] == "the last line of this rank"
            for words in (f"rank {victim} ", "SIGKILL", "last line", "cpkit.connect()"):
                assert words in str(caught.value)
            with pytest.raises(cpkit.WorkersDied):
                lab.status()


def test_the_workers_of_a_killed_agent_end(runtime_dir: Path) -> None:
    """A rank that is stopped is continued, so that its watchdog ends it."""
    lab = cpkit.connect("agentless", nproc=2)
    workers = pids(lab)
    connection = RuntimeDir("agentless").connection()
    next(lab.measure([64], 2))
    os.kill(workers[1], signal.SIGSTOP)
    os.kill(connection.agent.pid, signal.SIGKILL)
    with pytest.raises(cpkit.WorkersDied, match="agent"):
        deque(lab.measure([64], 2), maxlen=0)
    until(lambda: all(map(has_ended, workers)), why="the ranks to end")
    assert not RuntimeDir("agentless").connection_file.exists()
    lab.close()


@pytest.mark.slow("two more starts of workers; test_orphans.py has the killed owner")
def test_workers_end_with_a_killed_owner_and_the_next_owner_gets_new_ones(
    runtime_dir: Path,
) -> None:
    code = "import cpkit, sys, time; lab = cpkit.connect('owned', nproc=2)\n"
    code += "print(lab.owned, *(w.pid for w in lab.status().workers), flush=True); time.sleep(99)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        owned, *workers = owner.stdout.readline().split()
        assert owned == "True"
        guest = cpkit.connect("owned", launch=False)
        assert guest.gather([64], 2).verified
        os.kill(RuntimeDir("owned").agent().process.pid, signal.SIGSTOP)  # a rank continues it
        owner.kill()
    named = (
        rf"process {owner.pid} \(`.*`\), which started them, has ended; cpkit.connect\(\) starts"
    )
    with pytest.raises(cpkit.WorkersDied, match=named), guest:
        deque(guest.measure([64], 2), maxlen=0)
    # The next owner connects at once, like a restarted kernel; it must not attach to old workers.
    with cpkit.connect("owned", nproc=2) as lab:
        assert not {int(pid) for pid in workers} & set(pids(lab))
        assert all(has_ended(int(pid)) for pid in workers)
        assert lab.gather([64], 2).verified
        lab.stop()


def test_the_connection_file_of_dead_workers_is_removed_with_a_warning(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = cpkit.connect("dead", nproc=1)
    connection = RuntimeDir("dead").connection()
    # All at once, so that no process can clean up.
    for pid in (connection.agent.pid, *pids(lab)):
        os.kill(pid, signal.SIGKILL)
    lab.close()
    until(lambda: not RuntimeDir("dead").is_locked(), why="the lock of a dead agent")
    assert RuntimeDir("dead").connection_file.exists()
    with pytest.raises(cpkit.NoWorkers):
        cpkit.connect("dead", launch=False)
    assert "its workers" in caplog.text
    assert "are dead" in caplog.text
    assert not RuntimeDir("dead").connection_file.exists()


def test_an_interrupt_of_the_notebooks_process_group_keeps_the_workers(
    runtime_dir: Path,
) -> None:
    code = """
import cpkit, os, signal, time
lab = cpkit.connect("interrupted", nproc=2)
before = [w.pid for w in lab.status().workers]
signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGINT))
signal.setitimer(signal.ITIMER_REAL, 0.5)
try:
    for _ in lab.measure([64], 2): pass
except KeyboardInterrupt:
    print("interrupted")
while lab.status().state != "idle": time.sleep(0.02)
assert lab.gather([64], 2).verified
assert before == [w.pid for w in lab.status().workers]
lab.stop()
print("usable")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        start_new_session=True,
        check=False,
    )
    assert done.stdout.split() == ["interrupted", "usable"], done.stderr


@pytest.mark.slow("one more start of workers; test_commands.py has the choice of the rank")
def test_a_rank_without_memory_is_named_and_not_the_one_that_waited_for_it(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", "2")
    with cpkit.connect("poor", nproc=2) as lab:
        assert lab.gather([64], 2).verified
        poor = psutil.Process(pids(lab)[1])
        poor.rlimit(psutil.RLIMIT_AS, (poor.memory_info().vms + (8 << 20), -1))
        with pytest.raises(cpkit.RequestFailed, match=r"^rank 1: .*memory"):
            lab.gather([60_000], 2, algorithm="padded", heads=1)
        poor.rlimit(psutil.RLIMIT_AS, (-1, -1))
        assert lab.gather([60_000], 2, algorithm="padded", heads=1).verified
        lab.stop()


def test_an_agent_that_is_killed_during_the_start_is_named_with_its_signal(
    runtime_dir: Path,
) -> None:
    settings = Launch(name="killed", nproc=1, owner=process_id())
    here = RuntimeDir("killed")
    here.create()
    here.record_end(PostMortem((), "that of the previous workers"))
    agent = launcher.start(settings)
    agent.kill()
    with pytest.raises(cpkit.ControlError, match=r"exit code -9 \(SIGKILL\)\n.*log is empty"):
        launcher.wait_until_ready(agent, settings)


def test_workers_that_cannot_start_raise_with_the_reason(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such0")
    with pytest.raises(cpkit.ControlError, match="did not start") as caught:
        cpkit.connect("unable", nproc=1)
    assert "no-such0" in str(caught.value)


# -------------------------------------------------------------- launch_workers.sh


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )


def test_the_script_starts_shows_and_stops_workers(runtime_dir: Path) -> None:
    started = script("--name", "shell", "--nproc", "2")
    assert started.returncode == 0, started.stderr
    assert "2 workers 'shell' are ready" in started.stdout
    twice = script("start", "--name", "shell", "--nproc", "2")
    assert twice.returncode == 1
    assert "already running" in twice.stderr
    shown = script("status", "--name", "shell")
    assert shown.returncode == 0
    assert "running until stopped" in shown.stdout
    with cpkit.connect("shell") as lab:
        assert (lab.owned, lab.world_size) == (False, 2)
        assert lab.status().log_dir in shown.stdout
    log = script("logs", "--name", "shell", "--lines", "5")
    assert "ready: 2 ranks" in log.stdout
    connection_file = RuntimeDir("shell").connection_file
    connection_file.chmod(0o644)
    assert "chmod 600" in script("status", "--name", "shell").stderr
    connection_file.chmod(0o600)
    guest = cpkit.connect("shell")
    stopped = script("stop", "--name", "shell")
    assert stopped.returncode == 0, stopped.stderr
    assert "are stopped" in stopped.stdout
    with pytest.raises(
        cpkit.WorkersDied, match=r"stop --name shell`\) stopped them; cpkit\.connect"
    ):
        guest.status()
    guest.close()
    assert script("status", "--name", "shell").returncode == 3
    assert "were not running" in script("stop", "--name", "shell").stdout


@pytest.mark.slow("one more start of workers; test_a_killed_worker_is_named has the death")
def test_max_restarts_restarts_the_ranks_after_a_death(runtime_dir: Path) -> None:
    started = script("--name", "restarted", "--nproc", "2", "--max-restarts", "1")
    assert started.returncode == 0, started.stderr
    with cpkit.connect("restarted", launch=False) as lab:
        first = pids(lab)
        os.kill(first[1], signal.SIGKILL)
        until(lambda: has_ended(first[0]), why="torchrun to end the other rank")
    with cpkit.connect("restarted", launch=False) as lab:
        assert not set(first) & set(pids(lab))
        assert lab.gather([64], 2).verified
        lab.stop()


@pytest.mark.parametrize(
    "arguments", ["--help", "start --help", "status --help", "logs --help", "stop -h"]
)
def test_every_command_has_help(arguments: str) -> None:
    shown = script(*arguments.split())
    assert shown.returncode == 0
    assert "--name" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("restart",), "start, status, logs or stop"),
        (("--nproc", "0"), "nproc is 0; it must be"),
        (("--nproc", "many"), "invalid int"),
        (("--device", "tpu"), "invalid choice"),
        (("--name", "../etc"), "letters"),
        (("--nnodes", "2"), "host:port"),
        (("--owner", "999999999"), "not a running process"),
        (("--speed", "11"), "unrecognized"),
        (("--algorithms", "missing.py"), "missing.py', which cannot be read"),
    ],
)
def test_the_script_rejects_bad_arguments(arguments: tuple[str, ...], words: str) -> None:
    refused = script(*arguments)
    assert refused.returncode in (1, 2)
    assert words in refused.stderr


def test_doctor_lists_what_this_machine_can_do() -> None:
    command = [sys.executable, "-m", "cpkit", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for subject in ("python", "torch", "cores", "shared memory", "collectives", "GPUs"):
        assert subject in done.stdout


@pytest.mark.slow("two more starts of workers; test_socket.py has TCP")
def test_two_sets_of_workers_run_side_by_side_one_over_tcp(runtime_dir: Path) -> None:
    started = script("--name", "network", "--nproc", "1", "--interface", "127.0.0.1")
    assert started.returncode == 0, started.stderr
    one = cpkit.connect("one", nproc=1)
    with cpkit.connect("network", launch=False) as network:
        assert network.status().endpoint.startswith("tcp://127.0.0.1:")
        assert launcher.stop("one")
        assert network.gather([64], 1).verified
        network.stop()
    one.close()
