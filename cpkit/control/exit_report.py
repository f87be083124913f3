"""Turns the death of a worker process into an error with rank, cause and last log lines."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

from cpkit.control.errors import WorkersDied
from cpkit.control.runtime_dir import READY, Connection, PostMortem, RuntimeDir, Worker

_POST_MORTEM_TIMEOUT_S = 20.0  # long, because only the post-mortem contains the exit codes
_LAST_LINES = 8
_LAST_BYTES = 16 << 10


def exit_report(runtime_dir: RuntimeDir, connection: Connection) -> WorkersDied | None:
    """Return an error when the agent or a rank has ended, otherwise None.

    Processes on other hosts cannot be checked and count as alive. In another container of this
    host, the agent's lock shows that it is alive.
    """
    if connection.host != socket.gethostname():
        return None
    if not connection.is_here():
        return None if runtime_dir.is_locked() else _from_processes(connection, [])
    dead = dead_workers(connection)
    if not dead and connection.agent.is_alive():
        return None
    connection.agent.send(signal.SIGCONT)  # a stopped agent writes no post-mortem
    return _from_post_mortem(runtime_dir, connection) or _from_processes(connection, dead)


def dead_workers(connection: Connection) -> list[Worker]:
    """Return the ranks on this host whose process has ended."""
    local = [worker for worker in connection.workers if worker.host == socket.gethostname()]
    return [worker for worker in local if not worker.process.is_alive()]


def last_lines(log: str) -> tuple[str, ...]:
    """Return the last non-empty lines of a log file; an empty tuple if it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines() if line.strip())[-_LAST_LINES:]


def describe_exit(exit_code: int | None) -> str:
    """Return an exit code as text, with the signal's name for a negative one."""
    if exit_code is None:
        return "an unknown exit code"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"exit code {exit_code} ({signal.Signals(-exit_code).name})"
    except ValueError:
        return f"exit code {exit_code}"


def _from_post_mortem(runtime_dir: RuntimeDir, connection: Connection) -> WorkersDied | None:
    """Wait for the agent's post-mortem. Return None when the agent will not write one."""
    deadline = time.monotonic() + _POST_MORTEM_TIMEOUT_S
    while time.monotonic() < deadline:
        may_write = connection.agent.is_alive() and not _is_restarting(runtime_dir)
        report = runtime_dir.post_mortem()
        if report:
            return _from_report(report)
        if not may_write:
            return None
        time.sleep(0.02)
    return None


def _is_restarting(runtime_dir: RuntimeDir) -> bool:
    """Return True after torchrun has restarted the ranks: a rank is in a phase before READY."""
    phases = runtime_dir.startup_phases()
    return any(phase != READY for process, phase in phases.items() if process.startswith("rank"))


def _from_report(report: PostMortem) -> WorkersDied:
    if not report.deaths:
        return WorkersDied(
            f"the workers have ended: {report.text}; cpkit.connect() starts new ones"
        )
    death = report.deaths[0]
    what = f"rank {death.rank} (pid {death.pid}) died with {describe_exit(death.exit_code)}"
    return WorkersDied(
        f"{death.cause or what}. The other ranks were stopped too; "
        f"cpkit.connect() starts new ones.\n{quoted(death.log_lines)}",
        rank=death.rank,
        exit_code=death.exit_code,
        log_lines=death.log_lines,
    )


def _from_processes(connection: Connection, dead: list[Worker]) -> WorkersDied:
    """Report without a post-mortem: the agent was killed, or has restarted the ranks."""
    if not dead or not connection.agent.is_alive():
        return WorkersDied(
            "the agent of the workers has ended, which ends the workers too; "
            "cpkit.connect() starts new ones"
        )
    first = dead[0]
    lines = last_lines(first.log)
    ranks = ", ".join(str(worker.rank) for worker in dead)
    return WorkersDied(
        f"rank(s) {ranks} of {connection.world_size} ended with an unknown exit code, because "
        f"the agent wrote no post-mortem. cpkit.connect() starts new ones.\n{quoted(lines)}",
        rank=first.rank,
        log_lines=lines,
    )


def quoted(lines: tuple[str, ...]) -> str:
    """Return the last lines of a log for an error message."""
    if not lines:
        return "Its log is empty."
    return "Last lines of its log:\n" + "\n".join(f"  {line}" for line in lines)
