"""Start, find and stop sets of workers. Does not import torch, which takes seconds."""

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
from cpkit.control.errors import (
    ControlError,
    NoAnswer,
    NoWorkers,
    OtherWorkers,
    RankHangs,
)
from cpkit.control.exit_report import describe_exit, last_lines, quoted
from cpkit.control.launch_options import Launch
from cpkit.control.messages import Done, Shutdown, Status, StatusResult
from cpkit.control.module_file import read_module
from cpkit.control.origin import describe, describe_holder, describe_process
from cpkit.control.readiness import StartDeadline, remove_stale_files, running, wait_for
from cpkit.control.runtime_dir import (
    ALREADY_RUNNING_CODE,
    AlreadyRunning,
    Connection,
    PostMortem,
    RuntimeDir,
    in_words,
    runtime_root,
)
from cpkit.processes import ProcessId, command, process_id
from cpkit.settings import check_all

_STOP_TIMEOUT_S = 20.0  # torchrun needs up to 5 s to end its ranks, 30 s before torch 2.12
_EXIT_TIMEOUT_S = 5.0
_PERIOD_S = 0.05
_log = logging.getLogger("cpkit")


def attach(
    name: str,
    nproc: int | None = None,
    device: str = "auto",
    algorithms: str = "",
    on_progress: Callable[[str], object] = lambda _: None,
) -> Client | None:
    """Return a client of the running workers of this name, or None. Waits until they answer.

    While they start or end, `on_progress` is called as by `StartDeadline`.

    Raises OtherWorkers when the workers have another `nproc`, `device` or content of the file
    `algorithms` than requested, and RankHangs when one of their ranks does not respond.
    """
    connection = running(name, on_progress)
    if connection is None:
        return None
    client = Client(connection)
    try:
        status = client.call(Status(), StatusResult)
        if status.state == "hung":
            raise RankHangs(f"a rank does not respond; the log is {status.workers[0].log}")
        _check_settings(connection, status, nproc, device, algorithms)
    except BaseException:
        client.close()
        raise
    return client


def start(launch: Launch) -> subprocess.Popen[bytes]:
    """Start an agent in its own session, and return immediately.

    Its own session shields the workers from an interrupt of the notebook. Raises ValueError for bad
    options or settings, and AlreadyRunning when workers of this name are running.
    """
    launch.check()
    check_all()
    runtime_dir = RuntimeDir(launch.runtime_dir_name)
    runtime_dir.create()
    if runtime_dir.is_locked():
        raise AlreadyRunning(launch.name, describe_holder(runtime_dir))
    with in_words(), runtime_dir.agent_log.open("ab") as log:
        runtime_dir.post_mortem_file.unlink(missing_ok=True)  # the agent may end before it does
        return subprocess.Popen(
            [sys.executable, "-m", "cpkit.control.agent", launch.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(),
        )


def wait_until_ready(
    agent: subprocess.Popen[bytes],
    launch: Launch,
    on_progress: Callable[[str], object] = lambda _: None,
) -> None:
    """Wait until the workers accept requests; on a node without rank 0, until the agent runs.

    See `StartDeadline` for `on_progress`. Raises AlreadyRunning, or ControlError with the cause. On
    any exception, an interrupt included, the agent and its ranks are ended first.
    """
    runtime_dir = RuntimeDir(launch.runtime_dir_name)
    deadline = StartDeadline(runtime_dir, on_progress)
    try:
        while not deadline.has_passed():
            code = agent.poll()
            if code is not None:
                raise _start_error(code, runtime_dir)
            holder = runtime_dir.agent() if runtime_dir.is_locked() else None
            is_ready = launch.node_rank > 0 or runtime_dir.connection() is not None
            is_holder = holder and holder.process.is_here() and holder.process.pid == agent.pid
            if is_holder and is_ready:
                return
            time.sleep(_PERIOD_S)
        raise NoAnswer(f"the workers did not start and were stopped: {deadline.describe()}")
    except BaseException:
        try:
            _end(process_id(agent.pid))
        except ProcessLookupError:  # the agent has already ended
            pass
        except OSError:  # no descriptor is free to look at the ranks, which the agent ends too
            agent.terminate()
        agent.wait(_STOP_TIMEOUT_S)
        raise


def stop(name: str) -> bool:
    """Stop the workers of this name and wait until they have ended. Return False without workers.

    Sends SIGTERM to the agent, identified by pid and start time, and SIGKILL after a timeout.
    Raises ControlError, and sends nothing, when the agent's pid means another process here.
    """
    runtime_dir = RuntimeDir(name)
    if not runtime_dir.is_locked():
        connection = runtime_dir.connection()
        if connection:
            remove_stale_files(runtime_dir, connection)
        return False
    agent = runtime_dir.agent()
    if agent and not agent.process.is_here():
        raise ControlError(
            f"the workers {name!r} run in another container (PID namespace) or on another machine, "
            f"where their process ids are valid: stop them there with `{command('stop', name)}`"
        )
    if agent:
        _check_is_agent(agent.process, runtime_dir)
        _record_stop(runtime_dir)
        _end(agent.process)
    # The threads of a zombie process may hold the lock a little longer.
    if not wait_for(lambda: not runtime_dir.is_locked(), _EXIT_TIMEOUT_S):
        raise NoAnswer(f"the workers {name!r} did not end; see {runtime_dir.agent_log}")
    return True


def _record_stop(runtime_dir: RuntimeDir) -> None:
    """Record that this process stops the workers, for the clients that still use them."""
    with contextlib.suppress(ControlError):  # full or read-only: they are stopped nevertheless
        runtime_dir.record_end(PostMortem((), f"{describe_process(process_id())} stopped them"))


def _check_is_agent(process: ProcessId, runtime_dir: RuntimeDir) -> None:
    """Check the command of a process that the lock file names, before it is sent a signal."""
    words: list[str] = []

    def is_read() -> bool:  # not while the process is starting its program, when it has no command
        nonlocal words
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(process.pid).cmdline()
        return bool(words) or not process.is_alive()

    wait_for(is_read, _EXIT_TIMEOUT_S)
    if process.is_alive() and "cpkit.control.agent" not in words:
        raise ControlError(
            f"{runtime_dir.lock_file} names process {process.pid} ({' '.join(words):.80}), which "
            f"is no agent of cpkit, so nothing was stopped: find out who wrote that file, then "
            f"remove it"
        )


def _end(agent: ProcessId) -> None:
    """End an agent and its ranks, with SIGTERM and then SIGKILL, and wait until they have ended.

    Ranks are killed before the agent, which then still removes its files: torchrun waits for a rank
    that hangs, before torch 2.12 for 30 s. A killed agent cannot end its ranks. Their watchdogs do,
    unless a rank hangs, so the remaining ranks are killed too. Stopped processes are continued,
    because they act on no signal but SIGKILL.
    """
    children: set[psutil.Process] = set()
    for end in (_terminate, _kill_ranks, _kill):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if agent.is_alive():
                process = psutil.Process(agent.pid)
                children |= set(process.children())
                end(process)
                _continue(process, *children)
        if wait_for(lambda: not agent.is_alive(), _STOP_TIMEOUT_S):
            break
    _, alive = psutil.wait_procs(children, timeout=_EXIT_TIMEOUT_S)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=_EXIT_TIMEOUT_S)


def _terminate(agent: psutil.Process) -> None:
    os.kill(agent.pid, signal.SIGTERM)


def _kill_ranks(agent: psutil.Process) -> None:
    """Kill the ranks, and no other child: the agent itself ends its MPS daemon."""
    for child in agent.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "cpkit.worker.rank" in child.cmdline():
                child.kill()


def _kill(agent: psutil.Process) -> None:
    os.kill(agent.pid, signal.SIGKILL)


def _continue(*processes: psutil.Process) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def shut_down(client: Client) -> None:
    """Send the workers a shutdown request, and wait until they have ended.

    If no answer arrives or a rank hangs, end their agent at once.
    """
    runtime_dir = RuntimeDir(client.connection.name)
    patience_s = _STOP_TIMEOUT_S
    if client.connection.host == socket.gethostname():
        _record_stop(runtime_dir)
    try:
        client.call(Shutdown(), Done)
    except ControlError as error:
        patience_s = 0.0 if isinstance(error, NoAnswer) else patience_s
        _log.warning(
            "the workers did not accept the shutdown request; stopping their agent instead"
        )
    if client.connection.host == socket.gethostname():
        wait_for(lambda: not runtime_dir.is_locked(), patience_s)
        if runtime_dir.agent() and runtime_dir.is_locked():
            stop(client.connection.name)


def names() -> list[str]:
    """Return the names of all sets of workers that run on this machine."""
    root = runtime_root()
    found = sorted(path.parent.name for path in root.glob("*/lock")) if root.exists() else []
    return [name for name in found if RuntimeDir(name).is_locked()]


def log_files(name: str) -> list[Path]:
    """Return the log files of the agent and of the ranks; a file may be empty."""
    runtime_dir = RuntimeDir(name)
    ranks = sorted(runtime_dir.log_dir.glob("*/attempt_*/*/stderr.log"))
    return [path for path in (runtime_dir.agent_log, *ranks) if path.exists()]


def require(name: str, nproc: int | None = None, device: str = "auto") -> Client:
    """Return a client as `attach` does. Raises NoWorkers when no workers of this name run."""
    client = attach(name, nproc, device)
    if client is None:
        raise NoWorkers(
            f"no workers named {name!r} are running on this machine: start them with "
            f"`{command('start', name)}`, or let cpkit.connect(launch=True) do it"
        )
    return client


def _check_settings(
    connection: Connection,
    running: StatusResult,
    nproc: int | None,
    device: str,
    algorithms: str,
) -> None:
    """Raise OtherWorkers when ranks, device or own algorithms differ from the request."""
    different: dict[str, object] = {}
    if nproc is not None and nproc != running.world_size:
        different["nproc"] = nproc
    if device not in ("auto", running.device.partition(":")[0]):
        different["device"] = device
    if algorithms and read_module(algorithms)[1] != connection.algorithms_digest:
        different["algorithms"] = algorithms
    if not different:
        return
    name = connection.name
    wanted = " and ".join(f"{key}={value!r}" for key, value in different.items())
    raise OtherWorkers(
        f"asked for {wanted}, but workers {name!r} already run on {running.device}: "
        f"{describe(connection)}. To use them, leave out {' and '.join(different)}. To start "
        f"others, choose another name. To stop these: `{command('stop', name)}`, or "
        f"in a notebook cpkit.connect({name!r}).stop()."
    )


def _environment() -> dict[str, str]:
    """Return this process's environment, with this cpkit first on PYTHONPATH."""
    home = str(Path(__file__).parents[2])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _start_error(code: int, runtime_dir: RuntimeDir) -> ControlError:
    if code == ALREADY_RUNNING_CODE:
        return AlreadyRunning(runtime_dir.name, describe_holder(runtime_dir))
    try:
        runtime_dir.create()
    except ControlError as error:  # the agent cannot write its log there
        return ControlError(f"the workers did not start: {error}")
    report = runtime_dir.post_mortem()
    cause = report.text if report else f"the agent ended with {describe_exit(code)}"
    lines = last_lines(str(runtime_dir.agent_log))
    if report and report.deaths:
        lines = report.deaths[0].log_lines
    return ControlError(f"the workers did not start: {cause}\n{quoted(lines)}")
