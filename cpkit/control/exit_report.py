"""From a dead process to an error that says which rank, of what, and its last words."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

from cpkit.control.errors import WorkersDied
from cpkit.control.runtime_dir import READY, Connection, Death, RuntimeDir, Worker

_PATIENCE_S = 20.0  # for the post-mortem of an agent that lives; it has the exit codes
_LAST_LINES = 8
_LAST_BYTES = 16 << 10


def exit_report(place: RuntimeDir, connection: Connection) -> WorkersDied | None:
    """None while agent and ranks live, as far as they run on this machine."""
    if connection.host != socket.gethostname():
        return None
    dead = dead_workers(connection)
    if not dead and connection.agent.is_alive():
        return None
    return _from_post_mortem(place, connection) or _from_what_is_seen(connection, dead)


def dead_workers(connection: Connection) -> list[Worker]:
    """The ranks of this machine whose process is gone."""
    here = [worker for worker in connection.workers if worker.host == socket.gethostname()]
    return [worker for worker in here if not worker.process.is_alive()]


def last_lines(log: str) -> tuple[str, ...]:
    """The end of a log file; nothing when there is none."""
    try:
        with Path(log).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines() if line.strip())[-_LAST_LINES:]


def describe_exit(exit_code: int) -> str:
    """An exit code in words: a negative one is a signal."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"exit code {exit_code} ({signal.Signals(-exit_code).name})"
    except ValueError:
        return f"exit code {exit_code}"


def _from_post_mortem(place: RuntimeDir, connection: Connection) -> WorkersDied | None:
    """The agent's word, once it is written; None when none will come."""
    give_up = time.monotonic() + _PATIENCE_S
    while time.monotonic() < give_up:
        may_write = connection.agent.is_alive() and not _is_restarting(place)
        report = place.post_mortem()
        if report:
            return _named(report.deaths[0]) if report.deaths else WorkersDied(report.text)
        if not may_write:
            return None
        time.sleep(0.02)
    return None


def _is_restarting(place: RuntimeDir) -> bool:
    """Whether torchrun has started the ranks again: they are in a step before the last."""
    steps = place.steps()
    return any(step != READY for process, step in steps.items() if process.startswith("rank"))


def _named(death: Death) -> WorkersDied:
    return WorkersDied(
        f"rank {death.rank} (pid {death.pid}) died with {describe_exit(death.exit_code)}"
        f"{': ' + death.cause if death.cause else ''}. The other ranks were ended too; "
        f"cpkit.connect() starts new ones.\n{_quoted(death.log_lines)}",
        rank=death.rank,
        exit_code=death.exit_code,
        log_lines=death.log_lines,
    )


def _from_what_is_seen(connection: Connection, dead: list[Worker]) -> WorkersDied:
    """The agent could not tell: it was killed, or it has started the ranks anew."""
    if not dead:
        return WorkersDied(
            "the agent that watches the workers is gone, and they end with it; "
            "cpkit.connect() starts new ones"
        )
    first = dead[0]
    lines = last_lines(first.log)
    ranks = ", ".join(str(worker.rank) for worker in dead)
    return WorkersDied(
        f"rank(s) {ranks} of {connection.world_size} ended, exit code unknown: the agent left no "
        f"word. cpkit.connect() starts new ones.\n{_quoted(lines)}",
        rank=first.rank,
        log_lines=lines,
    )


def _quoted(lines: tuple[str, ...]) -> str:
    if not lines:
        return "Its log is empty."
    return "Last lines of its log:\n" + "\n".join(f"  {line}" for line in lines)
