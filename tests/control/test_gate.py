"""Peers without a key, over TCP: what they make rank 0 hold, and that they keep no client out."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select

import msgspec
import psutil
import pytest

from cpkit.control.client import Client
from cpkit.control.errors import NoAnswer
from cpkit.control.gate import Gate
from cpkit.control.messages import MAX_MESSAGE_BYTES, Done, Put, Status, StatusResult
from cpkit.control.runtime_dir import Connection
from tests.helpers.control_server import ControlServer, in_background
from tests.helpers.processes import LIMIT_S

MB = 1_000_000
DESCRIPTORS = 256
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING = SIGNATURE + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
HELLO = b"\x04\xc8\x05HELLO" + bytes(194)
INITIATE = b"\x06" + (600).to_bytes(8) + b"\x08INITIATE" + bytes(591)
COMMAND = b"\x06" + (MAX_MESSAGE_BYTES).to_bytes(8)
PLAIN = GREETING.replace(b"CURVE", b"NULL\0")
OLD = SIGNATURE + b"\x01\x05" + bytes(100)  # ZMTP 2, a DEALER


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[psutil.Process, Connection]]:
    """Start a server in a process of its own that may open few descriptors."""
    command = [sys.executable, "-m", "tests.helpers.control_server", str(tmp_path), "127.0.0.1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        yield (
            psutil.Process(process.pid),
            msgspec.json.decode(process.stdout.readline(), type=Connection),
        )
        process.stdin.close()
        assert process.wait(LIMIT_S) == 0


def connect(endpoint: str) -> socket.socket:
    host, port = endpoint.removeprefix("tcp://").split(":")
    peer = socket.create_connection((host, int(port)), timeout=LIMIT_S)
    peer.setblocking(False)
    return peer


def send(peer: socket.socket, data: bytes) -> int:
    """Send what the kernel accepts; return the number of bytes."""
    try:
        return peer.send(data)
    except OSError:  # full, or the server has closed the connection
        return 0


def ask(connection: Connection) -> float:
    """Return the seconds that a new client needs to connect and to receive the status."""
    start_s = time.monotonic()
    client = Client(connection)
    assert client.call(Status(), StatusResult).name == "test"
    client.close()
    return time.monotonic() - start_s


def test_peers_without_a_key_cost_almost_nothing_and_keep_no_client_out(
    server: tuple[psutil.Process, Connection],
) -> None:
    """Among them: 100 that claim and send 16 MiB, 100 after a forged handshake, 1,000 half-open."""
    process, connection = server
    old_client = Client(connection)
    assert old_client.call(Status(), StatusResult).name == "test"
    before_bytes = process.memory_info().rss
    with ExitStack() as stack:
        for start in (GREETING + COMMAND, GREETING + HELLO + INITIATE + COMMAND):
            peers = [stack.enter_context(connect(connection.endpoint)) for _ in range(100)]
            for peer in peers:
                send(peer, start)
            for _ in range(16):
                for peer in peers:
                    send(peer, bytes(MAX_MESSAGE_BYTES // 16))
            assert ask(connection) < 2
        for start in (b"", SIGNATURE, GREETING, PLAIN, OLD) * 200:
            send(stack.enter_context(connect(connection.endpoint)), start)
        assert ask(connection) < 2
        assert process.memory_info().rss - before_bytes < 10 * MB
        assert process.num_fds() < DESCRIPTORS
        assert old_client.call(Status(), StatusResult).name == "test"
    old_client.close()


@pytest.mark.parametrize("free", [-2, 1, 2, 3, 12])
def test_a_server_without_descriptors_rejects_clients_and_recovers(
    server: tuple[psutil.Process, Connection], free: int
) -> None:
    """ZeroMQ would end the process: it must accept a connection only while descriptors are free."""
    process, connection = server
    old_client = Client(connection)
    assert old_client.call(Status(), StatusResult).name == "test"
    limit = process.num_fds() + free
    process.rlimit(psutil.RLIMIT_NOFILE, (limit, DESCRIPTORS))
    with pytest.raises(NoAnswer, match=r"rank 0 has (too many|no more) .*close other clients"):
        Client(connection).call(Status(), StatusResult, 2.0)
    assert old_client.call(Status(), StatusResult).name == "test"
    process.rlimit(psutil.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    assert ask(connection) < LIMIT_S
    old_client.close()


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (PLAIN, SIGNATURE),
        (OLD, SIGNATURE),
        (GREETING + COMMAND + bytes(1000), GREETING),
        (GREETING + b"\x04\xff" + bytes(255), GREETING),
        (GREETING + b"\x00\xc8" + bytes(200), GREETING),
        (GREETING + HELLO + COMMAND + bytes(1000), GREETING + HELLO),
        (GREETING + HELLO + INITIATE[:-1], GREETING + HELLO),
        (GREETING + HELLO + INITIATE + COMMAND, GREETING + HELLO + INITIATE + COMMAND),
    ],
)
def test_only_a_complete_handshake_is_forwarded(
    tmp_path: Path, sent: bytes, forwarded: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as zeromq:
        zeromq.bind(f"{tmp_path}/s")
        zeromq.listen()
        gate = Gate("127.0.0.1", f"{tmp_path}/s")
        gate.start()
        with connect(gate.endpoint) as peer:
            peer.sendall(sent)
            with suppress(OSError):  # the gate has ended the connection already
                peer.shutdown(socket.SHUT_WR)
            assert select([peer], [], [], LIMIT_S)[0], "the gate must end the connection"
        zeromq.settimeout(0 if not forwarded else LIMIT_S)
        try:
            inner, _ = zeromq.accept()
        except BlockingIOError:
            received = b""
        else:
            with inner:
                received = b"".join(iter(lambda: inner.recv(1 << 16), b""))
        assert received == forwarded
        gate.close()


@pytest.mark.parametrize(
    ("sent", "handshake_s"),
    [(b"", 0.2), (GREETING, 0.2), (GREETING + HELLO, LIMIT_S), (GREETING + HELLO[::-1], LIMIT_S)],
)
def test_a_peer_that_sends_nothing_more_or_is_rejected_is_disconnected(
    tmp_path: Path, sent: bytes, handshake_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpkit.control.gate._HANDSHAKE_S", handshake_s)
    control_server = ControlServer(tmp_path, "127.0.0.1")
    with connect(control_server.server.endpoint) as peer:
        peer.settimeout(LIMIT_S / 2)
        peer.sendall(sent)
        with suppress(ConnectionResetError):
            while peer.recv(1 << 16):
                continue
    control_server.close()


def test_large_replies_arrive_over_tcp_also_when_the_server_closes(tmp_path: Path) -> None:
    control_server = ControlServer(tmp_path, "127.0.0.1")
    client, text = control_server.client(), "x" * (MAX_MESSAGE_BYTES - 100)
    for close in (lambda: None, control_server.server.close):
        thread, outcome = in_background(client.call, Put(2), Done)
        control_server.answer(Done(text))
        close()
        thread.join()
        assert outcome == [Done(text)]
    assert not [thread for thread in threading.enumerate() if thread.name == "cpkit gate"]
    client.close()


def test_a_connection_that_ends_while_the_gate_closes_is_no_error(tmp_path: Path) -> None:
    """It leaves the set of connections after `_run` has looked at it."""
    gate = Gate("127.0.0.1", f"{tmp_path}/s")

    async def ends_with_the_listener() -> None:
        await asyncio.sleep(0)

    task = gate._loop.create_task(ends_with_the_listener())
    gate._connections.add(task)
    task.add_done_callback(gate._forget)
    gate._accepting.cancel()
    gate._run()
    assert gate._reserve.closed
