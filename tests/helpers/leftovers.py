"""What workers create and must remove: processes, sockets, connection files and segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

import cpkit
from cpkit.control.runtime_dir import Agent, RuntimeDir
from cpkit.settings import shm_dir
from tests.helpers.processes import LIMIT_S, left_after, processes_with


def check_nothing_is_left(runtime_dir: Path) -> Iterator[None]:
    """Yield to the test; afterwards check that no new process, socket, file or segment is left."""
    before = leftovers(runtime_dir)
    yield
    left = left_after(LIMIT_S, lambda: leftovers(runtime_dir) - before)
    for process, words in processes_with("JUPYTER_RUNTIME_DIR", runtime_dir).items():
        if words in left:  # workers of a failed test that have no owner
            process.kill()
    assert not left


def leftovers(runtime_dir: Path) -> set[str]:
    """Return everything that workers create and must remove."""
    found = processes_with("JUPYTER_RUNTIME_DIR", runtime_dir).values()
    ours = {
        words for words in found if "cpkit.worker.rank" in words or "cpkit.control.agent" in words
    }
    sockets = {str(agent.socket_dir) for agent in agents(runtime_dir)}
    ours |= {f"socket {path}" for path in sockets if Path(path).exists()}
    ours |= {f"file {path}" for path in runtime_dir.glob("cpkit/*/connection.json")}
    return ours | {f"segment {name}" for name in segments()}


def agents(runtime_dir: Path) -> Iterator[Agent]:
    """Yield the agents that hold a lock or were the last to hold it."""
    for lock in runtime_dir.glob("cpkit/*/lock"):
        agent = RuntimeDir(lock.parent.name).agent()
        if agent:
            yield agent


def segments() -> set[str]:
    """Return the names of cpkit's shared-memory segments."""
    return {path.name for path in shm_dir().glob("cpkit*")}


def pids(lab: cpkit.Lab) -> list[int]:
    """Return the process id of each rank."""
    return [worker.pid for worker in lab.status().workers]


def has_ended(pid: int) -> bool:
    """Return True for a zombie too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
