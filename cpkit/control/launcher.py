"""Start, find and stop sets of workers. Imports no torch: only the agent and the ranks do."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cpkit.control.client import Client
from cpkit.control.errors import ControlError, NoAnswer, NoWorkers, OtherWorkers, Unreadable
from cpkit.control.exit_report import dead_workers, last_lines
from cpkit.control.launch_options import Launch
from cpkit.control.messages import Done, Shutdown, Status, StatusResult
from cpkit.control.origin import describe, describe_place
from cpkit.control.runtime_dir import NAME_TAKEN_CODE, Connection, NameTaken, RuntimeDir
from cpkit.processes import ProcessId, process_id

READY_S = 90.0  # without progress of any process
_ENDING_S = 20.0  # torchrun uses 5 s of it to end its ranks
_LEAVING_S = 5.0
_PERIOD_S = 0.05
_log = logging.getLogger("cpkit")


def running(name: str) -> Connection | None:
    """Return the connection of the running workers of this name; None when there are none.

    Waits while workers start or end. Removes the files of dead workers and logs a warning. Raises
    ControlError when the connection file is not safe to use, NoAnswer when a start or an end
    takes too long.
    """
    place = RuntimeDir(name)
    patience = _Patience(place)
    while not patience.is_over():
        is_held = place.is_locked()
        try:
            connection = place.connection()
        except Unreadable as error:
            if is_held:
                raise
            _log.warning("removed a file of dead workers: %s", error)
            place.clean()
            return None
        if (
            connection
            and connection.host != socket.gethostname()
            and not _is_stale(connection, is_held)
        ):
            return _of_another_host(connection)
        if not is_held:
            if connection:
                _clean_up_after(place, connection)
            return None
        if connection and not _is_ending(connection):
            return connection
        time.sleep(_PERIOD_S)
    raise NoAnswer(f"the workers {name!r} hold their name but are not ready: {patience.words()}")


def attach(name: str, nproc: int | None = None, device: str = "auto") -> Client | None:
    """Return a client of the running workers of this name, after they answered; None without any.

    Raises OtherWorkers when `nproc` or `device` is given and the workers differ from it.
    """
    connection = running(name)
    if connection is None:
        return None
    client = Client(connection)
    try:
        _check_as_asked(connection, client.call(Status(), StatusResult), nproc, device)
    except BaseException:
        client.close()
        raise
    return client


def start(launch: Launch) -> subprocess.Popen[bytes]:
    """Start an agent in its own session, and return immediately.

    Signals to this process do not reach it, so an interrupt of the notebook does not stop the
    workers. Raises ValueError for bad options, NameTaken when workers of this name are running.
    """
    launch.check()
    place = RuntimeDir(launch.place_name)
    place.create()
    if place.is_locked():
        raise NameTaken(launch.name, describe_place(place))
    with place.agent_log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cpkit.control.agent", launch.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(),
        )


def wait_until_ready(agent: subprocess.Popen[bytes], launch: Launch) -> None:
    """Return when the workers accept requests. Raises NameTaken, or ControlError with the cause.

    On a node without rank 0 it returns as soon as the agent holds its name. If the wait ends in an
    exception, an interrupt included, the agent and its ranks are ended first.
    """
    try:
        _wait_until_ready(agent, launch)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # the agent has already ended
            _end(process_id(agent.pid))
        agent.wait(_ENDING_S)
        raise


def _wait_until_ready(agent: subprocess.Popen[bytes], launch: Launch) -> None:
    place = RuntimeDir(launch.place_name)
    patience = _Patience(place)
    while not patience.is_over():
        code = agent.poll()
        if code is not None:
            raise _did_not_start(code, place)
        holder = place.agent() if place.is_locked() else None
        is_ready = launch.node_rank > 0 or place.connection() is not None
        if holder and holder.process.pid == agent.pid and is_ready:
            return
        time.sleep(_PERIOD_S)
    raise NoAnswer(f"the workers did not start and were stopped: {patience.words()}")


def stop(name: str) -> bool:
    """Stop the workers of this name and wait until they have ended; False when there were none.

    Sends SIGTERM to the agent, identified by pid and start time, and SIGKILL after a timeout.
    """
    place = RuntimeDir(name)
    if not place.is_locked():
        connection = place.connection()
        if connection:
            _clean_up_after(place, connection)
        return False
    agent = place.agent()
    if agent:
        _end(agent.process)
    # The threads of a zombie process may hold its files a little longer.
    if not wait_for(lambda: not place.is_locked(), _LEAVING_S):
        raise NoAnswer(f"the workers {name!r} did not end; see {place.agent_log}")
    return True


def _end(agent: ProcessId) -> None:
    """End an agent and its ranks, with SIGTERM and then SIGKILL, and wait until they have ended.

    A killed agent can't end its ranks. The watchdog of a rank does, unless the rank hangs, so the
    ranks that remain are killed too.
    """
    ranks: set[psutil.Process] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            ranks |= set(psutil.Process(agent.pid).children()) if agent.is_alive() else set()
            if agent.is_alive():
                os.kill(agent.pid, number)
        if wait_for(lambda: not agent.is_alive(), _ENDING_S):
            break
    _, alive = psutil.wait_procs(ranks, timeout=_LEAVING_S)
    for rank in alive:
        rank.kill()
    psutil.wait_procs(alive, timeout=_LEAVING_S)


def shut_down(client: Client) -> None:
    """Send the workers a shutdown request, and wait until they have ended."""
    place = RuntimeDir(client.connection.name)
    try:
        client.call(Shutdown(), Done)
    except ControlError:
        _log.warning(
            "the workers did not accept the shutdown request; stopping their agent instead"
        )
    if client.connection.host == socket.gethostname():
        wait_for(lambda: not place.is_locked(), _ENDING_S)
        if place.agent() and place.is_locked():
            stop(client.connection.name)


def names() -> list[str]:
    """Return the names of all sets of workers that run on this machine."""
    root = RuntimeDir("default").directory.parent
    found = sorted(path.parent.name for path in root.glob("*/lock")) if root.exists() else []
    return [name for name in found if RuntimeDir(name).is_locked()]


def log_files(name: str) -> list[Path]:
    """Return the log files of the agent and of the ranks; a file may be empty."""
    place = RuntimeDir(name)
    ranks = sorted(place.log_dir.glob("*/attempt_*/*/stderr.log"))
    return [path for path in (place.agent_log, *ranks) if path.exists()]


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for a condition; return False on timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PERIOD_S)
    return True


def require(name: str, nproc: int | None = None, device: str = "auto") -> Client:
    """Return what `attach` returns. Raises NoWorkers when no workers of this name are running."""
    client = attach(name, nproc, device)
    if client is None:
        raise NoWorkers(
            f"no workers named {name!r} are running on this machine: start them with "
            f"`./launch_workers.sh --name {name}`, or let cpkit.connect(launch=True) do it"
        )
    return client


def _check_as_asked(
    connection: Connection, running: StatusResult, nproc: int | None, device: str
) -> None:
    """Raise OtherWorkers when the number of ranks or the device differs from the request."""
    asked: dict[str, object] = {}
    if nproc is not None and nproc != running.world_size:
        asked["nproc"] = nproc
    if device not in ("auto", running.device.partition(":")[0]):
        asked["device"] = device
    if not asked:
        return
    name = connection.name
    wanted = " and ".join(f"{key}={value!r}" for key, value in asked.items())
    raise OtherWorkers(
        f"asked for {wanted}, but workers {name!r} already run on {running.device}: "
        f"{describe(connection)}. To use them, leave out {' and '.join(asked)}. To start others "
        f"beside them, choose another name. To end them: `python -m cpkit stop --name {name}`, or "
        f"in a notebook cpkit.connect({name!r}).stop()."
    )


class _Patience:
    """A deadline that each startup step renews, so that a slow start does not time out."""

    def __init__(self, place: RuntimeDir) -> None:
        self._place = place
        self._steps: dict[str, str] | None = None
        self._deadline = 0.0

    def is_over(self) -> bool:
        """Return True when no process has made progress for READY_S."""
        steps = self._place.startup_phases()
        if steps != self._steps:
            self._steps, self._deadline = steps, time.monotonic() + READY_S
        return time.monotonic() > self._deadline

    def words(self) -> str:
        """Describe the last step of each process, and name the log files."""
        steps = ", ".join(f"{process}: {step}" for process, step in (self._steps or {}).items())
        return (
            f"no progress within {READY_S:g} s ({steps or 'no process has started'}); "
            f"see {self._place.agent_log} and {self._place.log_dir}"
        )


def _is_ending(connection: Connection) -> bool:
    """Return True while the remaining workers shut down: the owner or a rank has ended."""
    owner_is_gone = connection.owner is not None and not connection.owner.is_alive()
    return owner_is_gone or bool(dead_workers(connection))


def _is_stale(connection: Connection, is_held: bool) -> bool:
    """Return True for a private socket without an agent, left from before the host was renamed."""
    return connection.endpoint.startswith("ipc:") and not is_held


def _clean_up_after(place: RuntimeDir, connection: Connection) -> None:
    _log.warning(
        "removed %s: its workers (agent %d) are dead", place.connection_file, connection.agent.pid
    )
    here = [w for w in connection.workers if w.host == socket.gethostname()]
    wait_for(lambda: len(dead_workers(connection)) == len(here), 2.0)
    place.clean()


def _of_another_host(connection: Connection) -> Connection:
    if connection.endpoint.startswith("ipc:"):
        raise ControlError(
            f"the workers {connection.name!r} run on {connection.host} and accept no connections "
            f"from here: start them with --interface, or choose another name"
        )
    return connection


def _environment() -> dict[str, str]:
    """Return this process's environment, with this cpkit first on PYTHONPATH."""
    home = str(Path(__file__).parents[2])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _did_not_start(code: int, place: RuntimeDir) -> ControlError:
    lines = "\n".join(f"  {line}" for line in last_lines(str(place.agent_log)))
    if code == NAME_TAKEN_CODE:
        return NameTaken(place.name, describe_place(place))
    report = place.post_mortem()
    if report and report.deaths:
        first = report.deaths[0]
        lines = "\n".join(f"  {line}" for line in first.log_lines)
        return ControlError(f"the workers did not start: {report.text}\n{lines}")
    return ControlError(f"the workers did not start (agent's exit code {code}):\n{lines}")
