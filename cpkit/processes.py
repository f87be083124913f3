"""Which process is meant: a pid alone is reused, a pid with its start time is not."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil

_HAS_PROC = Path("/proc/self/stat").exists()


class ProcessId(NamedTuple):
    """A process for as long as the machine is up.

    `start_ticks` counts from the boot where the system tells so: unlike a time of day, it stays
    the same when somebody sets the clock.
    """

    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        """Whether that very process still runs; a zombie does not."""
        return _start_ticks(self.pid) == self.start_ticks


def leave(exit_code: int) -> NoReturn:
    """End this process without Python's own tear-down, which takes half a CPU second with torch.

    Only for a process that has closed what others can see: sockets, files, locks.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def process_id(pid: int | None = None) -> ProcessId:
    """The identity of a running process (default: this one). Raises ProcessLookupError."""
    pid = os.getpid() if pid is None else pid
    ticks = _start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(f"there is no running process {pid}")
    return ProcessId(pid, ticks)


def _start_ticks(pid: int) -> int | None:
    """When a process started; None when it does not run."""
    try:
        if _HAS_PROC:
            # "pid (name) state …": the name may hold blanks and brackets, so count from its end.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[19]) if fields[0] not in "ZX" else None
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE
        return round(process.create_time() * 100) if alive else None
    except (OSError, psutil.Error):
        return None
