"""The identity of a process, also in containers; commands with a closed pipe or old terminal."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from cpkit.control import launcher, readiness
from cpkit.control.errors import ControlError
from cpkit.control.exit_report import exit_report
from cpkit.control.runtime_dir import Agent, RuntimeDir, Worker, write_private
from cpkit.processes import process_id
from cpkit.sync.shm import _create, reap_dead_files
from tests.helpers import ROOT
from tests.helpers.control_server import connection
from tests.helpers.processes import new_pid_namespace, until

# What an agent and rank 0 leave in the runtime directory, without torchrun.
AGENT = """
import socket, sys, time
import cpkit.processes
from cpkit.control import agent
from cpkit.control.runtime_dir import Agent, RuntimeDir, write_private
from tests.helpers.control_server import connection
import msgspec
if sys.argv[1:] == ["pretend"]:
    cpkit.processes._namespace = lambda: "elsewhere"
here = RuntimeDir("here")
agent._write_agent(here.acquire_lock(), Agent(cpkit.processes.process_id(), ""))
mine = msgspec.structs.replace(connection(), host=socket.gethostname())
write_private(here.connection_file, mine)
print("ready", flush=True)
time.sleep(60)
"""


def test_this_process_is_alive() -> None:
    me = process_id()
    assert me.pid == os.getpid()
    assert me.is_alive()
    assert process_id(os.getppid()).is_alive()


def test_another_process_with_the_same_pid_does_not_count() -> None:
    me = process_id()
    assert not me._replace(start_ticks=me.start_ticks - 1).is_alive()


def test_a_zombie_and_a_reaped_process_are_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = process_id(child.pid)
        assert identity.is_alive()
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped
        assert not identity.is_alive()
    assert not identity.is_alive()
    with pytest.raises(ProcessLookupError):
        process_id(child.pid)


def test_a_process_counts_as_alive_while_no_descriptor_is_free() -> None:
    """Otherwise a rank at its limit would take its owner for dead, and exit."""
    me = process_id()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert me.is_alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("container", ["pretend", "real"])
def test_workers_in_another_container_are_neither_dead_nor_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    real = container == "real"
    command = [*(new_pid_namespace() if real else []), sys.executable, "-c", AGENT]
    here = RuntimeDir("here")
    with subprocess.Popen(
        [*command, *([] if real else ["pretend"])], stdout=subprocess.PIPE
    ) as agent:
        assert agent.stdout
        agent.stdout.readline()
        connection = here.connection()
        assert connection
        assert exit_report(here, connection) is None
        with pytest.raises(ControlError, match=r"in another container.*--interface"):
            readiness.running("here")
        with pytest.raises(ControlError, match=r"in another container.*stop them there"):
            launcher.stop("here")
        assert here.is_locked()
        agent.kill()
    until(lambda: exit_report(here, connection), why="the agent's lock to be free")
    assert readiness.running("here") is None
    assert not here.connection_file.exists()


def test_workers_whose_agent_was_killed_are_not_used_while_its_lock_is_still_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process frees its lock with its last thread, and the ranks end after it."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    here = RuntimeDir("here")
    with (
        subprocess.Popen(["sleep", "60"]) as agent,
        subprocess.Popen(["sleep", "60"]) as rank,
    ):
        lock = here.acquire_lock()
        killed = Agent(process_id(agent.pid), "")
        os.pwrite(lock, msgspec.json.encode(killed), 0)
        host = socket.gethostname()
        worker = Worker(0, host, process_id(rank.pid), "", "cpu")
        mine = msgspec.structs.replace(
            connection(),
            endpoint="tcp://127.0.0.1:1",
            host=host,
            agent=killed.process,
            workers=(worker,),
        )
        write_private(here.connection_file, mine)
        assert readiness.running("here") == mine
        agent.kill()
        agent.wait()
        timers = [threading.Timer(0.3, os.close, (lock,)), threading.Timer(0.4, rank.kill)]
        for timer in timers:
            timer.start()
        assert readiness.running("here") is None
        rank.wait()
        for timer in timers:
            timer.join()


def test_segments_of_another_container_are_not_reaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPKIT_SHM_DIR", str(tmp_path))
    reap = "from cpkit.sync.shm import reap_dead_files as reap; print(len(reap()))"
    command = [*new_pid_namespace(), sys.executable, "-c", reap]
    path, own, _ = _create(4096, 1)
    assert path
    assert own
    assert subprocess.check_output(command, text=True) == "0\n"
    assert path.exists()
    own.close()
    assert reap_dead_files() == [path]


def run_without(tmp_path: Path, stdout: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command without programs in PATH, and with ASCII as its only encoding."""
    return subprocess.run(
        [sys.executable, "-m", "cpkit", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            "PATH": "/nonexistent",
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONIOENCODING": "ascii",
            "JUPYTER_RUNTIME_DIR": str(tmp_path),
        },
    )


def test_a_terminal_without_unicode_shows_question_marks(tmp_path: Path) -> None:
    done = run_without(tmp_path, subprocess.PIPE, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  ? by design: it uses the ordinary collective" in done.stdout


@pytest.mark.parametrize(
    ("command", "code"), [("status", 3), ("stop", 0), ("lab --help", 0), ("logs", 1)]
)
def test_a_reader_that_has_ended_is_no_error(tmp_path: Path, command: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_without(tmp_path, writer, *command.split())
    os.close(writer)
    assert done.returncode == code
    assert "Error" not in done.stderr


def test_an_output_without_room_is_one_line_and_an_error(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run_without(tmp_path, full.fileno(), "status")
    assert done.returncode == 1
    assert done.stderr == "the output could not be written: No space left on device\n"


LATE_SIGNAL = """
import contextlib, os, signal, subprocess
from cpkit.control import agent
from cpkit.control.launch_options import Launch
from cpkit.control.runtime_dir import RuntimeDir
from cpkit.processes import process_id

owner = subprocess.Popen(["sleep", "60"])
launch = Launch(name="late", nproc=1, device="cpu", owner=process_id(owner.pid))

def run(*_):
    owner.kill()
    owner.wait()
    return agent.PostMortem((), "they were stopped")

@contextlib.contextmanager
def device(*_):
    yield
    os.kill(os.getpid(), signal.SIGTERM)

agent._run, agent._device, agent._watch_owner = run, device, lambda owner: None
RuntimeDir("late").create()
try:
    agent.main([launch.to_json()])
finally:
    print(owner.pid, RuntimeDir("late").post_mortem().text)
"""


def test_the_end_of_the_owner_is_reported_also_if_its_signal_arrives_late(tmp_path: Path) -> None:
    """The ranks have exited, torchrun has returned, and then the agent receives SIGTERM."""
    done = subprocess.run(
        [sys.executable, "-c", LATE_SIGNAL],
        cwd=ROOT,
        env={**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    pid, text = done.stdout.split(maxsplit=1)
    assert re.search(rf"process {pid} .*which started them, has ended", text), done
