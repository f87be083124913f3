"""Which process is meant: a pid alone is reused, a pid with its start time is not."""

from __future__ import annotations

import os
from typing import NamedTuple

import psutil


class ProcessId(NamedTuple):
    """A process for as long as the machine is up. `start_time` is psutil's, in seconds."""

    pid: int
    start_time: float

    def is_alive(self) -> bool:
        """Whether that very process still runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.start_time) < 0.05
            return same and bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False


def process_id(pid: int | None = None) -> ProcessId:
    """The identity of a running process (default: this one). Raises psutil.NoSuchProcess."""
    pid = os.getpid() if pid is None else pid
    return ProcessId(pid, psutil.Process(pid).create_time())
