"""Wait for a condition, and find processes that are still running."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

Found = TypeVar("Found")
LIMIT_S = 60.0  # a wait ends as soon as its condition is true, so a large limit costs nothing


def until(
    condition: Callable[[], object],
    timeout_s: float = LIMIT_S,
    why: str | Callable[[], str] = "",
) -> None:
    """Return as soon as the condition is true; fail after the timeout.

    `why`: what the condition means, or a function that describes the current state.
    """
    if left_after(timeout_s, lambda: not condition()):
        words = why() if callable(why) else why
        pytest.fail(f"not within {timeout_s:g} s: {words or 'see the line that waits'}")


def left_after(timeout_s: float, find: Callable[[], Found]) -> Found:
    """Return what `find` finds after the timeout; return at once if it finds nothing."""
    deadline = time.monotonic() + timeout_s
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def processes_with(variable: str, value: object) -> dict[psutil.Process, str]:
    """Return the running processes with this in their environment, each with a description."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(value):
                found[process] = f"process {process.pid}: {' '.join(process.cmdline())}"
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return found


def new_pid_namespace() -> list[str]:
    """Return the command prefix that runs a program as in a container; skip where that is refused.

    The program has pid 1, and other pids mean other processes than here.
    """
    return _unshare("--pid", "--fork", "--mount-proc", "--kill-child")


def in_small_tmpfs(directory: Path, megabytes: int) -> list[str]:
    """Return the command prefix that runs a program with a tmpfs of this size at `directory`.

    Only the program sees it. Skip where that is refused.
    """
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" && exec "$@"'
    return [*_unshare("--mount"), "sh", "-c", mount, str(directory)]


def _unshare(*options: str) -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    prefix = ["unshare", *user, *options]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"this machine refuses {' '.join(prefix)}: {done.stderr.strip()}")
    return prefix
