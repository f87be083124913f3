"""The identity of a process, and a command whose output is a closed pipe or an old terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cpkit.processes import ProcessId, process_id
from tests.helpers import ROOT


def test_this_process_is_alive() -> None:
    me = process_id()
    assert me.pid == os.getpid()
    assert me.is_alive()
    assert process_id(os.getppid()).is_alive()


def test_another_process_with_the_same_pid_does_not_count() -> None:
    me = process_id()
    assert not ProcessId(me.pid, me.start_ticks - 1).is_alive()


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
