"""Identify a process by its pid and its start time, because a pid alone is reused."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil

_HAS_PROC = Path("/proc/self/stat").exists()


def command(action: str, name: str) -> str:
    """Return the shell command for an action on the workers of this name, for a message."""
    return f"{shlex.quote(sys.executable)} -m cpkit {action} --name {name}"


class ProcessId(NamedTuple):
    """The identity of a process, unique until the machine restarts.

    On Linux, `start_ticks` counts from the boot, so it does not depend on the system clock.
    """

    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        """Return True while this process runs; False for a zombie and when the pid was reused."""
        return _start_ticks(self.pid) == self.start_ticks


def leave(exit_code: int) -> NoReturn:
    """Exit without Python's shutdown, which takes half a CPU second with torch.

    Call it only after sockets, files and locks that other processes can see are closed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def process_id(pid: int | None = None) -> ProcessId:
    """Return the identity of a running process (default: this one). Raises ProcessLookupError."""
    pid = os.getpid() if pid is None else pid
    ticks = _start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(f"there is no running process {pid}")
    return ProcessId(pid, ticks)


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process; None when it is not running."""
    try:
        if _HAS_PROC:
            # "pid (name) state …": the name may contain spaces and parentheses, so split after it.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[19]) if fields[0] not in "ZX" else None
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE
        return round(process.create_time() * 100) if alive else None
    except (OSError, psutil.Error):
        return None
