"""Keys, garbage and invalid requests over a real Unix socket, and over TCP; no workers run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from cpkit.control.errors import ControlError, NoAnswer, WorkersBusy
from cpkit.control.messages import (
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    Done,
    Failed,
    Put,
    Reply,
    Request,
    Status,
    StatusResult,
    decode,
    encode,
)
from cpkit.control.queue import MAX_CLIENT_JOBS
from tests.helpers.control_server import ControlServer, in_background
from tests.helpers.processes import LIMIT_S, until


@pytest.fixture(params=["", "127.0.0.1"], ids=["unix", "tcp"])
def control_server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ControlServer]:
    control_server = ControlServer(tmp_path, request.param)
    yield control_server
    control_server.close()


def test_a_wrong_client_key_raises_at_once_and_not_at_the_deadline(
    control_server: ControlServer,
) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = control_server.client(client_public_key=public, client_secret_key=secret)
    started = time.monotonic()
    with pytest.raises(NoAnswer, match="rejected the client key"):
        stranger.call(Status(), StatusResult, 60.0)
    assert time.monotonic() - started < 30
    assert control_server.client().call(Status(), StatusResult).name == "test"


def test_a_server_with_a_wrong_key_never_receives_a_request(control_server: ControlServer) -> None:
    client = control_server.client(server_public_key=zmq.curve_keypair()[0].decode())
    with pytest.raises(NoAnswer):
        client.call(Status(), StatusResult, 1.0)
    assert len(control_server.server.jobs) == 0


def test_a_client_without_keys_receives_nothing(control_server: ControlServer) -> None:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger, dealer.rcvtimeo = 0, 300
    dealer.connect(control_server.server.endpoint)
    dealer.send(encode(Request("a", 1.0, Status())))
    with pytest.raises(zmq.Again):
        dealer.recv()
    dealer.close()


def test_garbage_gets_an_answer_and_does_no_harm(control_server: ControlServer) -> None:
    dealer = control_server.raw()
    for garbage in (
        b"",
        b"\x80\x04\x95.",
        b"\xc1" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x82\xa2id\xa1\xff\xa7version\x01",  # invalid UTF-8
        b"\x83\xa2id\xa1a\xa7version\x01\xa1x" + b"\x91" * 200_000,  # nested too deeply
        msgspec.msgpack.encode({"id": "x" * (MAX_REQUEST_BYTES - 60), "version": 1}),
        msgspec.msgpack.encode({"id": "", "version": 1}),
    ):
        dealer.send(garbage)
        assert decode(dealer.recv(), Reply).body.kind == "bad_request"
    dealer.send_multipart([b"several", b"frames"])
    assert isinstance(decode(dealer.recv(), Reply).body, Failed)
    dealer.close()
    assert control_server.client().call(Status(), StatusResult).name == "test"


def test_a_message_larger_than_the_limit_costs_its_sender_the_connection(
    control_server: ControlServer,
) -> None:
    dealer = control_server.raw()
    dealer.send(bytes(MAX_REQUEST_BYTES))
    assert decode(dealer.recv(), Reply).body.kind == "bad_request"
    dealer.rcvtimeo = 300
    dealer.send(bytes(MAX_REQUEST_BYTES + 1))
    with pytest.raises(zmq.Again):
        dealer.recv()
    dealer.close()
    assert control_server.client().call(Status(), StatusResult).name == "test"


@pytest.mark.parametrize(
    ("request_fields", "kind", "words"),
    [
        ({"version": 99}, "version", "version 99"),
        ({"body": {"op": "format_disk"}}, "bad_request", "format_disk"),
        ({"body": {"op": "status", "why": 1}}, "bad_request", "why"),
        ({"deadline_s": -1.0}, "bad_request", "positive"),
        ({"deadline_s": float("nan")}, "bad_request", "positive"),
        ({"id": ""}, "bad_request", "64 characters"),
        ({"id": "x" * 65}, "bad_request", "64 characters"),
    ],
)
def test_an_invalid_request_is_rejected_with_its_id(
    control_server: ControlServer, request_fields: dict[str, object], kind: str, words: str
) -> None:
    fields = {"id": "q", "deadline_s": 1.0, "version": PROTOCOL_VERSION, "body": {"op": "status"}}
    fields.update(request_fields)
    dealer = control_server.raw()
    dealer.send(msgspec.msgpack.encode(fields))
    reply = decode(dealer.recv(), Reply)
    dealer.close()
    assert reply.id == (fields["id"] if len(str(fields["id"])) <= 64 else "")
    assert reply.body.kind == kind
    assert words in reply.body.message


def test_an_id_that_is_in_use_is_rejected(control_server: ControlServer) -> None:
    dealer = control_server.raw()
    for _ in range(2):
        dealer.send(encode(Request("same", 9.0, Put(2))))
    assert "in use" in decode(dealer.recv(), Reply).body.message
    dealer.close()


def test_a_client_of_another_protocol_version_raises_before_it_connects(
    control_server: ControlServer,
) -> None:
    with pytest.raises(ControlError, match=r"protocol 7.*stop them"):
        control_server.client(protocol=7)


def test_a_client_that_sends_too_fast_is_told_so_and_delays_no_other(
    control_server: ControlServer,
) -> None:
    """Its requests are as expensive to decode as possible, and it does not wait for answers."""
    workload = {"cp_size": 1, "lengths": []}
    body = {"op": "sweep", "workloads": [workload] * ((MAX_REQUEST_BYTES - 100) // 19)}
    request = msgspec.msgpack.encode({"id": "a", "deadline_s": 9.0, "version": 3, "body": body})
    client, dealer = control_server.client(), control_server.raw()
    dealer.sndhwm = 100
    end_s = time.monotonic() + 1
    while time.monotonic() < end_s:
        with contextlib.suppress(zmq.Again):
            while True:
                dealer.send(request, zmq.NOBLOCK)
        start_s = time.monotonic()
        for each in (client, control_server.client()):
            assert each.call(Status(), StatusResult).name == "test"
        assert time.monotonic() - start_s < 2
    texts = set()
    while not any("requests per second" in text for text in texts):
        texts.add(decode(dealer.recv(), Reply).body.message)
    dealer.close()


def test_a_client_that_sends_too_fast_gets_an_error_and_may_send_again(
    control_server: ControlServer,
) -> None:
    client, long = control_server.client(), Cancel("x" * (MAX_REQUEST_BYTES - 100))

    def call(body: Cancel | Status, kind: type[Done | StatusResult]) -> str:
        try:
            client.call(body, kind)
        except WorkersBusy as error:
            return str(error)
        return ""

    errors = [call(long, Done) for _ in range(30)]
    assert any("4 MiB) of requests per second: send fewer or smaller" in each for each in errors)
    until(lambda: not call(Status(), StatusResult), why="the rate to catch up")


def test_a_client_has_a_share_of_the_queue_over_all_its_connections(
    control_server: ControlServer,
) -> None:
    greedy, other = control_server.client(), control_server.client()
    waiting = [in_background(greedy.call, Put(2), Done, LIMIT_S) for _ in range(MAX_CLIENT_JOBS)]
    until(lambda: len(control_server.server.jobs) == MAX_CLIENT_JOBS, why="the queue to fill")
    with pytest.raises(WorkersBusy, match=f"this client has {MAX_CLIENT_JOBS + 1} open requests"):
        greedy.call(Put(2), Done)
    waiting.append(in_background(other.call, Put(2), Done, LIMIT_S))
    until(lambda: len(control_server.server.jobs) == len(waiting), why="the other client")
    first, second = (control_server.answer(Done()) for _ in range(2))
    assert first.client != second.client
    for _ in waiting[2:]:
        control_server.answer(Done())
    for thread, outcome in waiting:
        thread.join()
        assert outcome == [Done()]
