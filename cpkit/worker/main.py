"""Run one rank, after `cpkit.worker.rank` has started its watchdog and imported torch.

Rank 0 serves the control socket; the other ranks execute its commands. A rank that loses a peer
waits for the agent to end it, so that the agent can identify the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta
from typing import NoReturn

import msgspec
import torch
import torch.distributed as dist
import zmq

from cpkit import __version__
from cpkit.control.launch_options import Launch, address_of
from cpkit.control.messages import PROTOCOL_VERSION, StatusResult, WorkerInfo
from cpkit.control.runtime_dir import READY, Agent, Connection, RuntimeDir, Worker, write_private
from cpkit.control.server import Server
from cpkit.control.watchdog import remove_connection
from cpkit.devices import use_local_gpu
from cpkit.processes import process_id
from cpkit.settings import GPU_NOTE, passed_on, worker_device
from cpkit.worker.commands import CommandChannel
from cpkit.worker.limits import memory_limit_bytes
from cpkit.worker.scheduler import Executor, Scheduler

_LOST_PEER_PATIENCE_S = 10.0
_log = logging.getLogger("cpkit")


def main(launch: Launch, place: RuntimeDir, agent: Agent) -> None:
    """Join the process group, then serve or execute commands until shutdown."""
    me = f"rank {os.environ['RANK']}"
    place.set_startup_phase(me, "preparing its device")
    if worker_device() == "cuda":
        use_local_gpu(shared=launch.share_gpu)
    memory_limit_bytes()  # cache it before requests use memory
    place.set_startup_phase(me, "joining the process group")
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    channel = CommandChannel()
    workers = _introduce(channel, place)
    place.set_startup_phase(me, READY)
    try:
        if channel.rank == 0:
            _serve(launch, place, agent, workers, channel)
        else:
            Executor(channel).run()
    except RuntimeError as error:  # gloo reports a closed connection like this
        _wait_for_the_end(error)
    dist.destroy_process_group()


def _serve(
    launch: Launch,
    place: RuntimeDir,
    agent: Agent,
    workers: tuple[Worker, ...],
    channel: CommandChannel,
) -> None:
    """Rank 0: bind the socket, write the connection file, run the scheduler."""
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    started = time.monotonic()

    def status(ahead: int) -> StatusResult:
        return _status(launch, place, workers, server.endpoint, ahead, time.monotonic() - started)

    server = Server(_endpoint(launch, agent), server_secret, client_public, status)
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
        log_dir=str(place.log_dir),
    )
    write_private(place.connection_file, connection)
    server.start()
    _log.warning("ready: %d ranks at %s", len(workers), server.endpoint)
    Scheduler(server, channel).run()
    server.close()
    remove_connection(place, agent)


def _status(
    launch: Launch,
    place: RuntimeDir,
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
        device=_device_words(),
        state="busy" if ahead else "idle",
        ahead=ahead,
        uptime_s=uptime_s,
        endpoint=endpoint,
        log_dir=str(place.log_dir),
        owner_pid=launch.owner.pid if launch.owner else None,
        symmetric_backend=_backend_name(),
        memory_limit_bytes=memory_limit_bytes(),
        workers=tuple(
            WorkerInfo(w.rank, w.process.pid, w.host, worker_device(), w.log) for w in workers
        ),
    )


def _device_words() -> str:
    if worker_device() == "cpu":
        return "cpu"
    return f"cuda: {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"


def _backend_name() -> str:
    if worker_device() == "cpu":
        return "POSIX shared memory"
    return "torch.distributed._symmetric_memory. " + passed_on(GPU_NOTE)


def _endpoint(launch: Launch, agent: Agent) -> str:
    """Return an ipc endpoint in the agent's private directory, or TCP on the chosen interface."""
    if launch.interface:
        return f"tcp://{address_of(launch.interface)}:*"
    return f"ipc://{agent.socket_dir}/control"


def _introduce(channel: CommandChannel, place: RuntimeDir) -> tuple[Worker, ...]:
    """Return the process of each rank, for the connection file. Collective."""
    me = Worker(channel.rank, socket.gethostname(), process_id(), _my_log(place))
    answers = channel.all_gather_bytes(msgspec.msgpack.encode(me))
    return tuple(msgspec.msgpack.decode(answer, type=Worker) for answer in answers)


def _my_log(place: RuntimeDir) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank = os.environ.get("LOCAL_RANK", "0")
    found = sorted(place.log_dir.glob(f"*/attempt_{attempt}/{rank}/stderr.log"))
    return str(found[-1]) if found else ""


def _wait_for_the_end(error: Exception) -> NoReturn:
    """Wait for the agent to end this rank, because the first rank to exit counts as the cause."""
    _log.warning("lost a peer, or the connection to it", exc_info=error)
    time.sleep(_LOST_PEER_PATIENCE_S)
    _log.error("the agent did not end this rank, so the rank exits: %s", error)
    os._exit(1)  # destroying a broken process group may wait forever
