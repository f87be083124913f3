"""A control server without workers: the test takes the jobs and replies to them.

    python -m tests.helpers.control_server DIRECTORY ADDRESS

serves in a process of its own until its stdin ends. It prints its connection file.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import msgspec
import zmq

from cpkit.control.client import Client
from cpkit.control.messages import PROTOCOL_VERSION, ReplyBody, StatusResult, Workload
from cpkit.control.queue import Job
from cpkit.control.runtime_dir import Connection, Worker
from cpkit.control.server import Server
from cpkit.processes import process_id
from tests.helpers.processes import LIMIT_S

WORKLOAD = Workload(2, (16,))


def connection() -> Connection:
    """Return the content of a connection file; no server listens at its endpoint."""
    me = process_id()
    return Connection(
        name="here",
        endpoint="ipc:///nowhere/control",
        server_public_key="s" * 40,
        client_public_key="c" * 40,
        client_secret_key="k" * 40,
        protocol=1,
        version="0",
        host="h",
        agent=me,
        owner=None,
        workers=(Worker(0, "h", me, "log", "cpu"),),
        log_dir="logs",
    )


class ControlServer:
    """A listening server, its keys, and the clients made by a test."""

    def __init__(self, directory: Path, address: str = "") -> None:
        self.server_keys, self.client_keys = zmq.curve_keypair(), zmq.curve_keypair()
        self.server = Server(
            f"{directory}/s", self.server_keys[1], self.client_keys[0], _status, address
        )
        self.server.start()
        self.clients: list[Client] = []

    def connection(self, **changes: object) -> Connection:
        connection = Connection(
            name="test",
            endpoint=self.server.endpoint,
            server_public_key=self.server_keys[0].decode(),
            client_public_key=self.client_keys[0].decode(),
            client_secret_key=self.client_keys[1].decode(),
            protocol=PROTOCOL_VERSION,
            version="0",
            host="another host: its processes cannot be checked",
            agent=process_id(),
            owner=None,
            workers=(),
            log_dir="the logs",
        )
        return msgspec.structs.replace(connection, **changes)

    def client(self, **changes: object) -> Client:
        self.clients.append(Client(self.connection(**changes)))
        return self.clients[-1]

    def answer(self, *bodies: ReplyBody) -> Job:
        """Take the next job, send these replies, and finish it."""
        job = self.server.jobs.take(LIMIT_S)
        for body in bodies:
            self.server.reply(job, body)
        self.server.jobs.finish()
        return job

    def raw(self) -> zmq.Socket[bytes]:
        """Return a socket with the right keys that can send anything."""
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.curve_serverkey = self.server_keys[0]
        dealer.curve_publickey, dealer.curve_secretkey = self.client_keys
        dealer.linger = 0
        dealer.rcvtimeo = 60_000
        dealer.connect(self.server.endpoint)
        return dealer

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


def _status(ahead: int) -> StatusResult:
    return StatusResult(
        "test", "0", "0", 2, (1, 2), "cpu", "idle", ahead, 0.0, "", "", None, "", 1, ()
    )


def in_background(function: object, *arguments: object) -> tuple[threading.Thread, list[object]]:
    """Call in a thread; append what it returns or raises to the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function(*arguments))  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - the test examines it
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def main(directory: str, address: str) -> None:
    control_server = ControlServer(Path(directory), address)
    print(msgspec.json.encode(control_server.connection()).decode(), flush=True)
    sys.stdin.read()
    control_server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
