"""A process is distinguished from a later one with the same pid, and from its own zombie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cpkit.processes import ProcessId, process_id


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
