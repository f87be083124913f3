"""The agent: run torchrun in its own session, remove its files, and report why a rank died.

The agent holds the lock of its name while it runs. `cpkit.control.launcher` starts it as
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
from cpkit.control.exit_report import describe_exit, last_lines
from cpkit.control.gpus import choose_device, gpu_count, is_shared
from cpkit.control.launch_options import Launch, from_json, loopback
from cpkit.control.runtime_dir import (
    NAME_TAKEN_CODE,
    SOCKET_DIR_PREFIX,
    Agent,
    Death,
    NameTaken,
    PostMortem,
    RuntimeDir,
    remove_socket_dir,
    write_private,
)
from cpkit.processes import ProcessId, leave, process_id
from cpkit.settings import DEVICE, GPU_NOTE, pass_on

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

BAD_SETTINGS_CODE = 2
_PERIOD_S = 0.25
_log = logging.getLogger("cpkit.agent")


def main(arguments: list[str]) -> int:
    """Run one set of workers until it ends, and return the exit code."""
    launch = from_json(arguments[0])
    place = RuntimeDir(launch.place_name)
    try:
        lock = place.acquire_lock()
    except NameTaken as taken:
        _log.error("%s", taken)
        return NAME_TAKEN_CODE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until torchrun installs its handlers
    _start_afresh(place)
    if launch.owner:
        threading.Thread(target=_end_with, args=(launch.owner,), daemon=True).start()
    report = PostMortem((), "the agent ended before it started the workers")
    socket_dir = _make_socket_dir()
    try:
        _introduce(lock, socket_dir)
        with _device(launch, Path(socket_dir)):
            report = _run(launch, place)
    except ValueError as error:
        report = PostMortem((), str(error))
        _log.error("%s", error)
        return BAD_SETTINGS_CODE
    finally:
        remove_socket_dir(socket_dir)
        if place.directory.exists():  # it may have been removed meanwhile
            write_private(place.post_mortem_file, report)
            place.clean()
        _reap_segments()
    _log.warning("%s", report.text)
    return 1 if report.deaths else 0


def _end_with(owner: ProcessId) -> None:
    """Send this process SIGTERM when the owner has ended.

    The ranks watch the owner too, but it may end before they start. PR_SET_PDEATHSIG does not work
    here, because it fires when the owner's *thread* that called `connect` ends.
    """
    while owner.is_alive():
        time.sleep(_PERIOD_S)
    _log.warning("stopping: the owner, process %d, has ended", owner.pid)
    os.kill(os.getpid(), signal.SIGTERM)


def torchrun_arguments(launch: Launch, place: RuntimeDir) -> list[str]:
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
        f"--log-dir={place.log_dir}",
        "--redirects=3",
        "--module",
        "cpkit.worker.rank",
    ]


def _run(launch: Launch, place: RuntimeDir) -> PostMortem:
    """Run torchrun until it ends, and return why it ended."""
    place.set_startup_phase("agent", "importing torch")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _reap_segments()
    launch.export()
    _prepare_environment(launch)
    try:
        arguments = torchrun_arguments(launch, place)
        if "--shutdown-timeout" in torchrun.get_args_parser().format_help():  # torch 2.12 and newer
            arguments.insert(0, "--shutdown-timeout=5")
        place.set_startup_phase("agent", "running torchrun")
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as failed:
        return _post_mortem(failed, place)
    except SignalException as signalled:
        if launch.owner and not launch.owner.is_alive():
            return PostMortem((), f"their owner, process {launch.owner.pid}, has ended")
        return PostMortem((), f"their agent received {signalled.sigval.name}")
    return PostMortem((), "the workers were asked to stop, or their owner has ended")


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
    with mps.serve(directory) as words:
        _log.warning("%s", words)
        pass_on(GPU_NOTE, f"{why}. {words}")
        yield


def _prepare_environment(launch: Launch) -> None:
    """Set environment variables for the ranks; values set by the user have priority."""
    threads = max(1, (os.cpu_count() or 1) // launch.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Restarted ranks must not read the addresses of dead ranks from a shared store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    interface = launch.interface or (loopback() if launch.nnodes == 1 else "")
    if interface and not interface[0].isdigit():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _start_afresh(place: RuntimeDir) -> None:
    """Remove the files of a killed agent; keep the previous logs beside the new ones."""
    if place.agent_log.exists():
        os.truncate(place.agent_log, 0)
    place.clean()
    place.post_mortem_file.unlink(missing_ok=True)
    shutil.rmtree(place.startup_dir, ignore_errors=True)
    previous = place.log_dir.with_name("logs.previous")
    if place.log_dir.exists():
        shutil.rmtree(previous, ignore_errors=True)
        place.log_dir.rename(previous)


def _reap_segments() -> None:
    """Remove segments of ranks that were killed before they could unlink them."""
    from cpkit.sync.shm import reap_dead_files

    with contextlib.suppress(OSError):
        reap_dead_files()


def _make_socket_dir() -> str:
    """Make a private directory whose path is short enough for a socket."""
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - made by mkdtemp, mode 0700
        room = zmq.IPC_PATH_MAX_LEN - len(parent) - len(f"/{SOCKET_DIR_PREFIX}12345678/control")
        if room > 0:
            return tempfile.mkdtemp(prefix=SOCKET_DIR_PREFIX, dir=parent)
    raise OSError(f"no temporary directory has a path short enough for a socket: {parent}")


def _introduce(lock: int, socket_dir: str) -> None:
    agent = Agent(process_id(), socket_dir)
    agent.export()
    os.ftruncate(lock, 0)
    os.pwrite(lock, msgspec.json.encode(agent), 0)


def _post_mortem(failed: ChildFailedError, place: RuntimeDir) -> PostMortem:
    deaths = [_death(rank, failure, place) for rank, failure in failed.failures.items()]
    deaths.sort(key=_was_consequence)
    first = deaths[0]
    return PostMortem(tuple(deaths), f"rank {first.rank} died: {describe_exit(first.exit_code)}")


def _was_consequence(death: Death) -> bool:
    """Return True for a rank that ended because it lost a peer: by SIGTERM or an exit code."""
    return death.exit_code >= 0 or death.exit_code == -signal.SIGTERM


def _death(rank: int, failure: Any, place: RuntimeDir) -> Death:
    logs = sorted(place.log_dir.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"))
    newest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
    lines = last_lines(str(newest)) if newest else ()
    return Death(rank, failure.pid, failure.exitcode, "", lines)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    leave(main(sys.argv[1:]))
