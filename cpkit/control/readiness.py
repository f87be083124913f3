"""Whether the workers of a name can be used: they may start, end, or be unreachable."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from cpkit.control.errors import ControlError, NoAnswer, Unreadable
from cpkit.control.exit_report import dead_workers
from cpkit.control.origin import ELSEWHERE
from cpkit.control.runtime_dir import READY, Connection, RuntimeDir
from cpkit.processes import command

READY_S = 90.0  # longest time between two startup phases
END_S = 35.0  # longest time to end: before torch 2.12, torchrun waits 30 s for a rank that hangs
UNREACHABLE_S = 5.0  # for workers that run without a socket or with a foreign file
_PERIOD_S, _PROGRESS_S = 0.05, 1.0
_log = logging.getLogger("cpkit")


def running(name: str, on_progress: Callable[[str], object] = lambda _: None) -> Connection | None:
    """Return the connection of the running workers of this name, or None.

    Waits while workers start or end; see `StartDeadline` for `on_progress`. Removes the files of
    dead workers and logs a warning. Raises ControlError when the connection file is not safe to
    use, and NoAnswer when starting or ending takes too long.
    """
    runtime_dir = RuntimeDir(name)
    deadline = StartDeadline(runtime_dir, on_progress)
    while True:
        is_held = runtime_dir.is_locked()
        try:
            connection = runtime_dir.connection()
        except Unreadable as error:
            if is_held:
                raise
            _log.warning("removed a file of dead workers: %s", error)
            runtime_dir.clean()
            return None
        if connection and connection.host != socket.gethostname() and not _is_ipc(connection):
            return connection
        if not is_held:
            # The file may be from before this host was renamed, or from a container that ended.
            if connection:
                remove_stale_files(runtime_dir, connection)
            return None
        if connection and not connection.is_here():
            _check_reachable(connection)
            return connection
        if connection and _is_usable(runtime_dir, connection):
            return connection
        if deadline.has_passed(_patience_s(runtime_dir, connection)):
            raise _not_ready(runtime_dir, connection, deadline)
        time.sleep(_PERIOD_S)


def _is_usable(runtime_dir: RuntimeDir, connection: Connection) -> bool:
    """Return False while workers end or cannot be reached. Continue a stopped agent of the former.

    Otherwise they would not end.
    """
    if _is_ending(connection):
        connection.agent.send(signal.SIGCONT)
        return False
    return not _missing(runtime_dir, connection)


def _patience_s(runtime_dir: RuntimeDir, connection: Connection | None) -> float:
    """Return how long workers may start or end, since the last startup phase."""
    phases = runtime_dir.startup_phases()
    ranks = {who: phase for who, phase in phases.items() if who.startswith("rank")}
    if not ranks or any(phase != READY for phase in ranks.values()):
        return READY_S
    if "rank 0" not in ranks:
        return 0.0
    return UNREACHABLE_S if connection and not _is_ending(connection) else END_S


def _not_ready(
    runtime_dir: RuntimeDir, connection: Connection | None, deadline: StartDeadline
) -> ControlError:
    name = runtime_dir.name
    if _patience_s(runtime_dir, connection) == READY_S:
        return NoAnswer(f"the workers {name!r} are running but not ready: {deadline.describe()}")
    why = _missing(runtime_dir, connection) or "do not end"
    return ControlError(f"the workers {name!r} run, but {why}. End them: `{command('stop', name)}`")


def _missing(runtime_dir: RuntimeDir, connection: Connection | None) -> str:
    """Return why workers that have started cannot be reached; empty if they can."""
    file = runtime_dir.connection_file
    if connection is None:
        if "rank 0" not in runtime_dir.startup_phases():
            return "rank 0 serves on another node, under the name without .node: connect there"
        return f"their connection file {file} was removed"
    holder = runtime_dir.agent()
    if holder is None or holder.process != connection.agent:
        return f"{file} is of other workers"
    socket_file = connection.endpoint.removeprefix("ipc://")
    if _is_ipc(connection) and not Path(socket_file).exists():
        return f"their socket {socket_file} was removed"
    return ""


def _is_ipc(connection: Connection) -> bool:
    return connection.endpoint.startswith("ipc://")


def _check_reachable(connection: Connection) -> None:
    """Raise ControlError when workers that run elsewhere have a socket file not found here."""
    if _is_ipc(connection) and not Path(connection.endpoint.removeprefix("ipc://")).exists():
        is_this_host = connection.host == socket.gethostname()
        raise ControlError(
            f"the workers {connection.name!r} run "
            f"{ELSEWHERE if is_this_host else f'on {connection.host}'} and accept no connections "
            f"from here: start them with --interface, or choose another name"
        )


class StartDeadline:
    """A deadline that each startup phase renews, so that a slow start does not time out.

    About once per second, `on_progress` gets the elapsed time and the phases of the ranks.
    """

    def __init__(
        self, runtime_dir: RuntimeDir, on_progress: Callable[[str], object] = lambda _: None
    ) -> None:
        self._runtime_dir = runtime_dir
        self._on_progress = on_progress
        self._began_s = self._reported_s = time.monotonic()
        self._phases: dict[str, str] | None = None
        self._since_s = 0.0

    def has_passed(self, limit_s: float | None = None) -> bool:
        """Return True when no process has made progress for `limit_s` (default: READY_S)."""
        phases = self._runtime_dir.startup_phases()
        if phases != self._phases:
            self._phases, self._since_s = phases, time.monotonic()
        now_s = time.monotonic()
        if now_s - self._reported_s >= _PROGRESS_S:
            self._reported_s = now_s
            self._on_progress(f"{now_s - self._began_s:.0f} s, {self._phases_of_ranks()}")
        return now_s - self._since_s > (READY_S if limit_s is None else limit_s)

    def _phases_of_ranks(self) -> str:
        """Return the phases of the ranks, each once; before there are ranks, the agent's."""
        phases = self._phases or {"agent": "starting Python"}
        ranks = [phase for process, phase in phases.items() if phase and process != "agent"]
        return ", ".join(dict.fromkeys(ranks or phases.values()))

    def describe(self) -> str:
        """Return the last phase of each process and the log files, for an error message."""
        phases = ", ".join(f"{process}: {phase}" for process, phase in (self._phases or {}).items())
        return (
            f"no progress within {READY_S:g} s ({phases or 'no process has started'}); "
            f"see {self._runtime_dir.agent_log} and {self._runtime_dir.log_dir}"
        )


def _is_ending(connection: Connection) -> bool:
    """Return True while the remaining workers shut down: owner, agent or a rank has ended.

    An agent that was killed may hold its lock for a moment, and its ranks run until they notice.
    """
    owner_has_ended = connection.owner is not None and not connection.owner.is_alive()
    return owner_has_ended or not connection.agent.is_alive() or bool(dead_workers(connection))


def remove_stale_files(runtime_dir: RuntimeDir, connection: Connection) -> None:
    """Remove the files of workers that have ended, and log a warning."""
    file, agent = runtime_dir.connection_file, connection.agent.pid
    _log.warning("removed %s: its workers (agent %d) are dead", file, agent)
    local = [w for w in connection.workers if w.host == socket.gethostname()]
    if connection.is_here():
        wait_for(lambda: len(dead_workers(connection)) == len(local), 2.0)
    runtime_dir.clean()


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for a condition; return False on timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PERIOD_S)
    return True
