"""Run one rank, after `cpkit.worker.rank` has started its watchdog and imported torch.

Rank 0 serves the control socket; the other ranks execute its commands. After losing a peer, a rank
waits until the agent ends it, so that the agent can identify the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from datetime import timedelta
from typing import NoReturn

import msgspec
import torch
import torch.distributed as dist
import zmq

from cpkit import __version__
from cpkit.algorithms import all_choices
from cpkit.control.errors import ControlError
from cpkit.control.launch_options import Launch, address_of
from cpkit.control.messages import PROTOCOL_VERSION, StatusResult, WorkerInfo
from cpkit.control.runtime_dir import (
    READY,
    Agent,
    Connection,
    RuntimeDir,
    Worker,
    continue_agent,
    write_private,
)
from cpkit.control.server import Server
from cpkit.control.watchdog import remove_connection
from cpkit.devices import gpu_id, use_local_gpu
from cpkit.memory import nccl_log
from cpkit.processes import process_id
from cpkit.settings import GPU_NOTE, passed_on, worker_device
from cpkit.sync.barrier import cores
from cpkit.worker import own_algorithms
from cpkit.worker.commands import CommandChannel, StepResult
from cpkit.worker.limits import memory_limit_bytes
from cpkit.worker.liveness import Heartbeat, Monitor
from cpkit.worker.scheduler import Executor, Scheduler

_AGENT_TIMEOUT_S = 10.0
_log = logging.getLogger("cpkit")


def main(launch: Launch, runtime_dir: RuntimeDir, agent: Agent) -> None:
    """Join the process group, then serve or execute commands until shutdown."""
    name = f"rank {os.environ['RANK']}"
    runtime_dir.set_startup_phase(name, "preparing its device")
    if worker_device() == "cuda":
        nccl_log.keep_silent()
        use_local_gpu(shared=launch.share_gpu)
        if launch.share_gpu:
            warnings.filterwarnings("ignore", message="ranks .* use one GPU")
    memory_limit_bytes()  # cached before requests use memory
    runtime_dir.set_startup_phase(name, "joining the process group")
    runtime_dir.hang_file.unlink(missing_ok=True)  # of the ranks before a restart
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    store = dist.distributed_c10d._get_default_store()
    channel = CommandChannel(store, dist.get_rank(), dist.get_world_size())
    workers = _gather_workers(channel, runtime_dir)
    digest = own_algorithms.load(launch.algorithms, store, runtime_dir)
    runtime_dir.set_startup_phase(name, READY)
    try:
        if channel.rank == 0:
            _serve(launch, runtime_dir, agent, workers, channel, store, digest)
        else:
            Heartbeat(store, channel.rank, runtime_dir).start()
            Executor(channel).run()
    except ControlError:  # this rank's own failure
        raise
    except RuntimeError as error:  # how the store reports a closed connection
        _wait_for_agent(error)
    dist.destroy_process_group()


def _serve(
    launch: Launch,
    runtime_dir: RuntimeDir,
    agent: Agent,
    workers: tuple[Worker, ...],
    channel: CommandChannel,
    store: dist.Store,
    digest: str,
) -> None:
    """On rank 0, bind the socket, write the connection file, and run the scheduler."""
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    start_s = time.monotonic()

    def status(ahead: int) -> StatusResult:
        uptime_s = time.monotonic() - start_s
        return _status(launch, runtime_dir, workers, server.endpoint, ahead, uptime_s)

    address = address_of(launch.interface) if launch.interface else ""
    path = f"{agent.socket_dir}/control"
    server = Server(path, server_secret, client_public, status, address)
    connection = Connection(
        name=launch.name,
        endpoint=server.endpoint,
        server_public_key=server_public.decode(),
        client_public_key=client_public.decode(),
        client_secret_key=client_secret.decode(),
        protocol=PROTOCOL_VERSION,
        version=__version__,
        host=socket.gethostname(),
        agent=agent.process,
        owner=launch.owner,
        workers=workers,
        log_dir=str(runtime_dir.log_dir),
        algorithms=launch.algorithms,
        algorithms_digest=digest,
    )
    monitor = Monitor(store, channel, workers, server, runtime_dir)
    write_private(runtime_dir.connection_file, connection)
    server.start()
    monitor.start()
    _log.warning("ready: %d ranks at %s", len(workers), server.endpoint)
    Scheduler(server, channel, monitor).run()
    server.close()
    remove_connection(runtime_dir, agent)


def _status(
    launch: Launch,
    runtime_dir: RuntimeDir,
    workers: tuple[Worker, ...],
    endpoint: str,
    ahead: int,
    uptime_s: float,
) -> StatusResult:
    world_size = len(workers)
    return StatusResult(
        name=launch.name,
        version=__version__,
        torch_version=str(torch.__version__),
        world_size=world_size,
        cp_sizes=tuple(n for n in range(1, world_size + 1) if world_size % n == 0),
        device=_describe_device(),
        state="busy" if ahead else "idle",
        ahead=ahead,
        uptime_s=uptime_s,
        endpoint=endpoint,
        log_dir=str(runtime_dir.log_dir),
        owner_pid=launch.owner.pid if launch.owner else None,
        symmetric_backend=_backend_name(),
        memory_limit_bytes=memory_limit_bytes(),
        workers=tuple(WorkerInfo(w.rank, w.process.pid, w.host, w.device, w.log) for w in workers),
        cores=cores(),
        gpus=len({(w.host, w.device) for w in workers if w.device != "cpu"}),
        load=os.getloadavg()[0],
        algorithms=all_choices(),
    )


def _describe_device() -> str:
    if worker_device() == "cpu":
        return "cpu"
    return f"cuda: {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"


def _backend_name() -> str:
    if worker_device() == "cpu":
        return "POSIX shared memory"
    return "torch.distributed._symmetric_memory. " + passed_on(GPU_NOTE)


def _gather_workers(channel: CommandChannel, runtime_dir: RuntimeDir) -> tuple[Worker, ...]:
    """On rank 0, return the process of each rank, for the connection file; otherwise ()."""
    gpu = gpu_id()
    device = f"cuda:{torch.cuda.current_device()} {gpu}" if gpu else "cpu"
    log = _log_file(runtime_dir)
    mine = Worker(channel.rank, socket.gethostname(), process_id(), log, device)
    channel.answer(StepResult(msgspec.msgpack.encode(mine)))
    if channel.rank > 0:
        return ()
    answers = channel.answers(lambda ranks, _: _log.warning("waiting for rank(s) %s", ranks))
    return tuple(msgspec.msgpack.decode(answer.report, type=Worker) for answer in answers)


def _log_file(runtime_dir: RuntimeDir) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank = os.environ.get("LOCAL_RANK", "0")
    found = sorted(runtime_dir.log_dir.glob(f"*/attempt_{attempt}/{rank}/stderr.log"))
    return str(found[-1]) if found else ""


def _wait_for_agent(error: Exception) -> NoReturn:
    """Wait for the agent to end this rank: torchrun reports the first rank to exit as the cause."""
    _log.warning("lost a peer, or the connection to it", exc_info=error)
    continue_agent()
    time.sleep(_AGENT_TIMEOUT_S)
    _log.error("the agent did not end this rank, so the rank exits: %s", error)
    os._exit(1)  # destroying a broken process group may block forever
