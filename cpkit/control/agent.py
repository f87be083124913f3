"""The agent: run torchrun in its own session, clean up after it, and report why a rank died.

The agent holds the lock of its name while it runs. `cpkit.control.launcher` starts it with
`python -m cpkit.control.agent OPTIONS`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from cpkit.control import mps
from cpkit.control.errors import ControlError, name_the_limit
from cpkit.control.exit_report import describe_exit, last_lines
from cpkit.control.gpus import choose_device, gpu_count, is_shared
from cpkit.control.launch_options import Launch, from_json, loopback
from cpkit.control.origin import describe_process
from cpkit.control.runtime_dir import (
    ALREADY_RUNNING_CODE,
    SOCKET_DIR_PREFIX,
    Agent,
    AlreadyRunning,
    Death,
    PostMortem,
    RuntimeDir,
    in_words,
    make_socket_dir,
    remove_socket_dir,
)
from cpkit.os_errors import describe, raise_descriptor_limit
from cpkit.processes import ProcessId, leave
from cpkit.settings import DEVICE, GPU_NOTE, pass_on

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

BAD_SETTINGS_CODE = 2
_PERIOD_S = 0.25
_log = logging.getLogger("cpkit.agent")


def main(arguments: list[str]) -> int:
    """Run one set of workers until it ends, and return the exit code."""
    launch = from_json(arguments[0])
    raise_descriptor_limit()
    runtime_dir = RuntimeDir(launch.runtime_dir_name)
    try:
        lock = runtime_dir.acquire_lock()
        with in_words():
            _remove_old_files(runtime_dir)
        agent = _make_socket_dir()
    except ControlError as error:
        _log.error("%s", error)
        return ALREADY_RUNNING_CODE if isinstance(error, AlreadyRunning) else BAD_SETTINGS_CODE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until torchrun installs its handlers
    if launch.owner:
        threading.Thread(target=_watch_owner, args=(launch.owner,), daemon=True).start()
    owner = describe_process(launch.owner) if launch.owner else ""  # while it runs
    report = PostMortem((), "the agent ended before it started them")
    try:
        _write_agent(lock, agent)
        with name_the_limit(), _device(launch, Path(agent.socket_dir)):
            report = _run(launch, runtime_dir)
    except (ControlError, ValueError) as error:
        report = PostMortem((), str(error))
        _log.error("%s", error)
        return BAD_SETTINGS_CODE
    finally:
        # The owner's end reaches this process twice: its ranks exit, so torchrun returns, and
        # `_watch_owner` sends SIGTERM, which may interrupt any line above, but none of these.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        if launch.owner and not launch.owner.is_alive():
            report = PostMortem((), f"{owner}, which started them, has ended")
        remove_socket_dir(agent)
        _leave_report(runtime_dir, report)
        _reap_segments()
    _log.warning("%s", report.text)
    return 1 if report.deaths else 0


def _watch_owner(owner: ProcessId) -> None:
    """Send SIGTERM to this process when the owner has ended.

    The ranks watch the owner too, but it may end before they start. PR_SET_PDEATHSIG does not work
    here, because it takes effect when the owner's *thread* that called `connect` ends.
    """
    while owner.is_alive():
        time.sleep(_PERIOD_S)
    _log.warning("stopping: the owner, process %d, has ended", owner.pid)
    os.kill(os.getpid(), signal.SIGTERM)


def torchrun_arguments(launch: Launch, runtime_dir: RuntimeDir) -> list[str]:
    """Return the command-line arguments for torchrun."""
    if launch.nnodes == 1:
        rendezvous = ["--standalone", "--local-addr=127.0.0.1"]
    else:
        rendezvous = [
            "--rdzv-backend=static",
            f"--nnodes={launch.nnodes}",
            f"--node-rank={launch.node_rank}",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--rdzv-id={launch.name}",
        ]
    return [
        *rendezvous,
        f"--nproc-per-node={launch.nproc}",
        f"--max-restarts={launch.max_restarts}",
        "--monitor-interval=0.05",
        f"--log-dir={runtime_dir.log_dir}",
        "--redirects=3",
        "--module",
        "cpkit.worker.rank",
    ]


def _run(launch: Launch, runtime_dir: RuntimeDir) -> PostMortem:
    """Run torchrun until it ends, and return why it ended."""
    runtime_dir.set_startup_phase("agent", "importing torch")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _reap_segments()
    launch.export()
    _prepare_environment(launch)
    try:
        arguments = torchrun_arguments(launch, runtime_dir)
        if "--shutdown-timeout" in torchrun.get_args_parser().format_help():  # torch 2.12 and newer
            arguments.insert(0, "--shutdown-timeout=5")
        runtime_dir.set_startup_phase("agent", "running torchrun")
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as failed:
        return _post_mortem(failed, runtime_dir)
    except SignalException as signalled:
        return PostMortem((), f"the agent received {signalled.sigval.name}")
    return PostMortem((), "they were stopped")


@contextlib.contextmanager
def _device(launch: Launch, directory: Path) -> Iterator[None]:
    """Choose the device of the ranks, and run an MPS daemon if they share a GPU."""
    gpus = 0 if launch.device == "cpu" else gpu_count()
    device, why = choose_device(launch, gpus)
    _log.warning("%s", why)
    pass_on(DEVICE, device)
    if device == "cpu" or not is_shared(launch, gpus):
        yield
        return
    with mps.serve(directory) as mps_status:
        _log.warning("%s", mps_status)
        pass_on(GPU_NOTE, f"{why}. {mps_status}")
        yield


def _prepare_environment(launch: Launch) -> None:
    """Set environment variables for the ranks; a value that the user has set is kept."""
    threads = max(1, (os.cpu_count() or 1) // launch.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Restarted ranks must not read the addresses of dead ranks from a shared store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    interface = launch.interface or (loopback() if launch.nnodes == 1 else "")
    if interface and not interface[0].isdigit():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _remove_old_files(runtime_dir: RuntimeDir) -> None:
    """Remove the files of the previous agent; keep its rank logs in `logs.previous`."""
    if runtime_dir.agent_log.exists():
        os.truncate(runtime_dir.agent_log, 0)
    runtime_dir.clean()
    runtime_dir.post_mortem_file.unlink(missing_ok=True)
    runtime_dir.hang_file.unlink(missing_ok=True)
    shutil.rmtree(runtime_dir.startup_dir, ignore_errors=True)
    previous = runtime_dir.log_dir.with_name("logs.previous")
    if runtime_dir.log_dir.exists():
        shutil.rmtree(previous, ignore_errors=True)
        runtime_dir.log_dir.rename(previous)


def _reap_segments() -> None:
    """Remove shared-memory segments of ranks that were killed before they unlinked them."""
    from cpkit.sync.shm import reap_dead_files

    with contextlib.suppress(OSError):
        reap_dead_files()


def _leave_report(runtime_dir: RuntimeDir, report: PostMortem) -> None:
    """Replace the connection file by a post-mortem. Log why, if that is not possible."""
    try:
        if runtime_dir.check():  # a user may have removed it
            runtime_dir.clean()  # first, because it makes room in a full file system
            runtime_dir.record_end(report)
    except ControlError as error:
        _log.error("no post-mortem was written: %s", error)


def _make_socket_dir() -> Agent:
    """Make a socket directory whose path is short enough. Raises ControlError."""
    try:
        for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - made by mkdtemp, mode 0700
            end = f"/{SOCKET_DIR_PREFIX}12345678/control"
            if len(parent) + len(end) < zmq.IPC_PATH_MAX_LEN:
                return make_socket_dir(parent)
    except OSError as error:
        raise ControlError(
            f"cannot make a directory for the control socket: {describe(error)}. Set TMPDIR to a "
            f"directory that you can write to, with a short path"
        ) from error
    raise ControlError(
        f"the path of {parent} is too long for a socket: set TMPDIR to a shorter one"
    )


def _write_agent(lock: int, agent: Agent) -> None:
    agent.export()
    with in_words():
        os.ftruncate(lock, 0)
        os.pwrite(lock, msgspec.json.encode(agent), 0)


def _post_mortem(failed: ChildFailedError, runtime_dir: RuntimeDir) -> PostMortem:
    deaths = [_death(rank, failure, runtime_dir) for rank, failure in failed.failures.items()]
    deaths.sort(key=_is_consequence)
    if hang := runtime_dir.hang():
        return PostMortem((hang, *deaths), hang.cause)
    first = deaths[0]
    return PostMortem(tuple(deaths), f"rank {first.rank} died: {describe_exit(first.exit_code)}")


def _is_consequence(death: Death) -> bool:
    """Return True for a rank that probably ended because a peer did: SIGTERM or an exit code."""
    return death.exit_code is None or death.exit_code >= 0 or death.exit_code == -signal.SIGTERM


def _death(rank: int, failure: Any, runtime_dir: RuntimeDir) -> Death:
    logs = sorted(runtime_dir.log_dir.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"))
    newest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
    lines = last_lines(str(newest)) if newest else ()
    return Death(rank, failure.pid, failure.exitcode, "", lines)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    leave(main(sys.argv[1:]))
