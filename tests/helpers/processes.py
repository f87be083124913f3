"""Processes that go their own way: wait for what they do, find those that are still there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import pytest

Found = TypeVar("Found")
LIMIT_S = 60.0  # a condition that comes true ends the wait at once, so a large limit costs nothing


def until(
    condition: Callable[[], object],
    timeout_s: float = LIMIT_S,
    why: str | Callable[[], str] = "",
) -> None:
    """Return once the condition is true; fail when that takes too long.

    `why`: what is waited for, or a function that describes what is there instead.
    """
    if left_after(timeout_s, lambda: not condition()):
        words = why() if callable(why) else why
        pytest.fail(f"not within {timeout_s:g} s: {words or 'see the line that waits'}")


def left_after(timeout_s: float, find: Callable[[], Found]) -> Found:
    """What `find` still finds after a while; at once, when it finds nothing more."""
    give_up = time.monotonic() + timeout_s
    while (found := find()) and time.monotonic() < give_up:
        time.sleep(0.02)
    return found


def processes_with(variable: str, value: object) -> dict[psutil.Process, str]:
    """Living processes that have this in their environment, with their pids and command lines."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(value):
                found[process] = f"process {process.pid}: {' '.join(process.cmdline())}"
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return found
