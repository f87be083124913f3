"""Identify a process by its pid, its start time and the PID namespace in which it has this pid.

A pid alone is reused, and each container has a PID namespace, where it means another process.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import psutil

_HAS_PROC = Path("/proc/self/stat").exists()


def command(action: str, name: str) -> str:
    """Return the shell command for an action on the workers of this name, for a message."""
    return f"{shlex.quote(sys.executable)} -m cpkit {action} --name {name}"


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command's main function, and exit with its code, whatever its output goes to.

    A pipe whose reader has ended (`… | head -1`) drops the rest of the output. A terminal that
    cannot encode a character shows a question mark.
    """
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)
    sys.exit(main())


def _tolerant(stream: TextIO | None) -> TextIO:
    """Return a stream that writes to the same file; None is an output that was closed (`>&-`)."""
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    raw = _ClosablePipe(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="replace", line_buffering=True
    )


class _ClosablePipe(io.FileIO):
    """An output that drops what is written after its reader has ended; without room it exits."""

    is_full = False

    def write(self, data: Any, /) -> int:
        try:
            return len(data) if self.is_full else super().write(data)
        except BrokenPipeError:
            return len(data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.is_full = True  # what is left is flushed once more at the exit
            raise SystemExit(f"the output could not be written: {error.strerror}") from None


class ProcessId(NamedTuple):
    """The identity of a process, unique until the machine restarts.

    On Linux, `start_ticks` counts from the boot, so it does not depend on the system clock.
    """

    pid: int
    start_ticks: int
    namespace: str = ""

    def is_here(self) -> bool:
        """Return True when the pid means this process here, not in another container or machine.

        An identity that was recorded without a namespace counts as here.
        """
        return self.namespace in ("", _namespace())

    def is_alive(self) -> bool:
        """Return False after this process has ended, also for a zombie and a reused pid.

        A process counts as alive while it cannot be seen: when it is not here, or no file
        descriptor is free.
        """
        try:
            return not self.is_here() or _start_ticks(self.pid) == self.start_ticks
        except OSError:
            return True

    def is_stopped(self) -> bool:
        """Return True for a process here that a signal or a debugger has stopped (state T or t)."""
        stopped = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        try:
            return self.is_running_here() and psutil.Process(self.pid).status() in stopped
        except psutil.Error:
            return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal if the process is running here. SIGCONT continues a stopped process."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.is_running_here():
                os.kill(self.pid, number)

    def is_running_here(self) -> bool:
        """Return True if the pid is known to mean this process here, and it has not ended."""
        return bool(self.namespace) and self.is_here() and self.is_alive()


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
    return ProcessId(pid, ticks, _namespace())


def _namespace() -> str:
    """Return the identity of this process's PID namespace; empty where there are none."""
    try:
        inode = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return ""
    return f"{inode}@{_boot_id()}"  # the first namespace has the same inode on every machine


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return ""


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process; None when it is not running. Raises OSError."""
    try:
        if _HAS_PROC:
            # "pid (name) state …": the name may contain spaces and parentheses, so split after it.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[19]) if fields[0] not in "ZX" else None
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE
        return round(process.create_time() * 100) if alive else None
    except (FileNotFoundError, ProcessLookupError, psutil.Error):
        return None
