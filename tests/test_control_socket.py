"""Server and client over a real socket with real keys; the work loop is the test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from cpkit.control.client import Client
from cpkit.control.errors import (
    BadRequest,
    Cancelled,
    ControlError,
    NoAnswer,
    RequestFailed,
    WorkersBusy,
)
from cpkit.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    Done,
    Failed,
    Measure,
    Put,
    Reply,
    Request,
    Sample,
    Status,
    StatusResult,
    Workload,
    decode,
    encode,
)
from cpkit.control.place import Connection
from cpkit.control.server import Server
from cpkit.processes import process_id

WORKLOAD = Workload(2, (16,))


class Desk:
    """A bound server, its keys, and clients that are closed at the end."""

    def __init__(self, directory: Path, endpoint: str | None = None) -> None:
        self.server_keys, self.client_keys = zmq.curve_keypair(), zmq.curve_keypair()
        self.server = Server(
            endpoint or f"ipc://{directory}/s", self.server_keys[1], self.client_keys[0], _status
        )
        self.server.start()
        self.clients: list[Client] = []

    def connection(self, **changes: object) -> Connection:
        connection = Connection(
            name="desk",
            endpoint=self.server.endpoint,
            server_public_key=self.server_keys[0].decode(),
            client_public_key=self.client_keys[0].decode(),
            client_secret_key=self.client_keys[1].decode(),
            protocol=PROTOCOL_VERSION,
            version="0",
            host="another host: its processes can't be looked for",
            agent=process_id(),
            owner=None,
            workers=(),
            log_dir="the logs",
        )
        return msgspec.structs.replace(connection, **changes)

    def client(self, **changes: object) -> Client:
        self.clients.append(Client(self.connection(**changes)))
        return self.clients[-1]

    def raw(self) -> zmq.Socket[bytes]:
        """A socket with the right keys and no manners."""
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.curve_serverkey = self.server_keys[0]
        dealer.curve_publickey, dealer.curve_secretkey = self.client_keys
        dealer.linger = 0
        dealer.rcvtimeo = 5000
        dealer.connect(self.server.endpoint)
        return dealer

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


def _status(ahead: int) -> StatusResult:
    return StatusResult(
        "desk", "0", "0", 2, (1, 2), "cpu", "idle", ahead, 0.0, "", "", None, "", 1, ()
    )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def in_background(function: object, *arguments: object) -> tuple[threading.Thread, list[object]]:
    """Call in a thread; what it returned or raised ends up in the list."""
    said: list[object] = []

    def run() -> None:
        try:
            said.append(function(*arguments))  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - it is handed to the test
            said.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, said


def test_status_is_answered_at_once_though_nobody_works(desk: Desk) -> None:
    client = desk.client()
    thread, _ = in_background(client.call, Put(2), Done, 0.5)
    time.sleep(0.1)
    assert client.call(Status(), StatusResult, 1.0).ahead == 1
    thread.join()


def test_a_wrong_client_key_is_told_at_once_not_after_a_timeout(desk: Desk) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = desk.client(client_public_key=public, client_secret_key=secret)
    started = time.monotonic()
    with pytest.raises(NoAnswer, match="refused the client key"):
        stranger.call(Status(), StatusResult, 20.0)
    assert time.monotonic() - started < 5
    assert desk.client().call(Status(), StatusResult).name == "desk"


def test_a_wrong_server_key_never_gets_our_orders(desk: Desk) -> None:
    confused = desk.client(server_public_key=zmq.curve_keypair()[0].decode())
    with pytest.raises(NoAnswer):
        confused.call(Status(), StatusResult, 1.0)
    assert len(desk.server.turns) == 0


def test_a_client_without_keys_hears_nothing(desk: Desk) -> None:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger, dealer.rcvtimeo = 0, 300
    dealer.connect(desk.server.endpoint)
    dealer.send(encode(Request("a", 1.0, Status())))
    with pytest.raises(zmq.Again):
        dealer.recv()
    dealer.close()


def test_garbage_gets_an_answer_and_does_no_harm(desk: Desk) -> None:
    dealer = desk.raw()
    for garbage in (
        b"",
        b"\x80\x04\x95.",
        b"\xc1" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x82\xa2id\xa1\xff\xa7version\x01",  # no UTF-8
        b"\x83\xa2id\xa1a\xa7version\x01\xa1x" + b"\x91" * 200_000,  # a nest without bottom
        msgspec.msgpack.encode({"id": "x" * ((1 << 24) - 60), "version": 1}),
        msgspec.msgpack.encode({"id": "", "version": 1}),
    ):
        dealer.send(garbage)
        reply = decode(dealer.recv(), Reply)
        assert isinstance(reply.body, Failed)
        assert reply.body.kind == "bad_request"
    dealer.send_multipart([b"several", b"frames"])
    assert isinstance(decode(dealer.recv(), Reply).body, Failed)
    dealer.close()
    assert desk.client().call(Status(), StatusResult).name == "desk"


def test_a_message_larger_than_the_limit_costs_its_sender_the_connection(desk: Desk) -> None:
    dealer = desk.raw()
    dealer.rcvtimeo = 300
    dealer.send(bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(zmq.Again):
        dealer.recv()
    dealer.close()
    assert desk.client().call(Status(), StatusResult).name == "desk"


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
def test_a_strange_request_is_refused_with_its_id(
    desk: Desk, request_fields: dict[str, object], kind: str, words: str
) -> None:
    fields = {"id": "q", "deadline_s": 1.0, "version": PROTOCOL_VERSION, "body": {"op": "status"}}
    fields.update(request_fields)
    dealer = desk.raw()
    dealer.send(msgspec.msgpack.encode(fields))
    reply = decode(dealer.recv(), Reply)
    dealer.close()
    assert reply.id == (fields["id"] if len(str(fields["id"])) <= 64 else "")
    assert isinstance(reply.body, Failed)
    assert reply.body.kind == kind
    assert words in reply.body.message


def test_an_id_that_is_in_use_is_refused(desk: Desk) -> None:
    dealer = desk.raw()
    for _ in range(2):
        dealer.send(encode(Request("same", 9.0, Put(2))))
    reply = decode(dealer.recv(), Reply)
    dealer.close()
    assert isinstance(reply.body, Failed)
    assert "in use" in reply.body.message


def test_a_client_of_another_protocol_version_is_told_before_it_connects(desk: Desk) -> None:
    with pytest.raises(ControlError, match=r"protocol 7.*stop them"):
        desk.client(protocol=7)


def test_nobody_answers(tmp_path: Path, desk: Desk) -> None:
    client = desk.client(endpoint=f"ipc://{tmp_path}/nobody")
    with pytest.raises(NoAnswer, match=r"no answer within 0\.3 s.*the logs"):
        client.call(Status(), StatusResult, 0.3)


def test_who_waits_behind_others_is_told_and_then_the_workers_are_busy(desk: Desk) -> None:
    first, second = desk.client(), desk.client()
    told: list[int] = []
    second.on_wait = told.append
    thread, _ = in_background(first.call, Put(2), Done, 5.0)
    job = desk.server.turns.take(5)
    assert job
    with pytest.raises(WorkersBusy, match=r"1 request\(s\)") as caught:
        second.call(Put(2), Done, 0.8)
    assert caught.value.ahead == 1
    assert told == [1]
    desk.server.tell(job, Done())
    desk.server.turns.done()
    thread.join()
    assert len(desk.server.turns) == 0, "who gave up must not stay in the line"


def test_replies_renew_the_deadline(desk: Desk) -> None:
    client = desk.client()
    sample = Sample(WORKLOAD, 0, 1, 1, (1.0,), (1.0,), (1.0,), {}, "symmetric", "")

    def work() -> None:
        job = desk.server.turns.take(5)
        assert job
        for _ in range(4):
            time.sleep(0.25)
            desk.server.tell(job, sample)
        desk.server.tell(job, Done())

    thread, _ = in_background(work)
    replies = list(client.stream(Measure(WORKLOAD), 0.6))
    assert [type(reply) for reply in replies] == [Sample] * 4 + [Done]
    thread.join()


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (Failed("bad_request", "no such thing"), BadRequest, "no such thing"),
        (Failed("cancelled", "given up"), Cancelled, "given up"),
        (Failed("busy", "full"), WorkersBusy, "full"),
        (Failed("internal", "it broke", 3), RequestFailed, "rank 3: it broke"),
    ],
)
def test_each_failure_is_an_error_of_its_own(
    desk: Desk, failure: Failed, error: type[Exception], words: str
) -> None:
    thread, said = in_background(desk.client().call, Put(2), Done, 5.0)
    job = desk.server.turns.take(5)
    assert job
    desk.server.tell(job, failure)
    desk.server.turns.done()
    thread.join()
    assert isinstance(said[0], error)
    assert words in str(said[0])


def test_closing_a_stream_cancels_it_and_so_does_a_client_that_goes(desk: Desk) -> None:
    client = desk.client()
    stream = client.stream(Measure(WORKLOAD))
    thread, _ = in_background(next, stream)
    job = desk.server.turns.take(5)
    assert job
    desk.server.tell(job, Sample(WORKLOAD, 0, 1, 1, (1.0,), (1.0,), (1.0,), {}, "symmetric", ""))
    thread.join()
    stream.close()
    wait_for(lambda: job.cancelled)

    gone = desk.raw()
    gone.send(encode(Request("g", 30.0, Measure(WORKLOAD))))
    desk.server.turns.done()
    job = desk.server.turns.take(5)
    assert job
    gone.close()
    wait_for(lambda: desk.server.tell(job, Done()) or job.cancelled)


def test_cancelling_what_waits_and_what_nobody_knows(desk: Desk) -> None:
    dealer = desk.raw()
    dealer.send(encode(Request("w", 30.0, Put(2))))
    dealer.send(encode(Request("c", 1.0, Cancel("w"))))
    said = {reply.id: reply.body for reply in (decode(dealer.recv(), Reply) for _ in range(2))}
    assert said["c"] == Done("cancelled")
    assert isinstance(said["w"], Failed)
    assert said["w"].kind == "cancelled"
    dealer.send(encode(Request("d", 1.0, Cancel("w"))))
    body = decode(dealer.recv(), Reply).body
    assert isinstance(body, Done)
    assert "no such request" in body.text
    dealer.close()


def test_a_closed_client_says_so(desk: Desk) -> None:
    client = desk.client()
    thread, said = in_background(client.call, Put(2), Done, 30.0)
    assert desk.server.turns.take(5)
    client.close()
    thread.join()
    assert isinstance(said[0], NoAnswer)
    assert "closed" in str(said[0])


def test_tcp_on_a_free_port(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "tcp://127.0.0.1:*")
    assert desk.client().call(Status(), StatusResult).name == "desk"
    assert desk.server.endpoint.startswith("tcp://127.0.0.1:")
    desk.close()


def test_closing_is_quick_even_when_nobody_can_be_told(desk: Desk) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = desk.client(client_public_key=public, client_secret_key=secret)
    with pytest.raises(NoAnswer):
        stranger.call(Put(2), Done, 5.0)
    started = time.monotonic()
    stranger.close()
    assert time.monotonic() - started < 1.0


def wait_for(condition: object) -> None:
    give_up = time.monotonic() + 5
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up
        time.sleep(0.02)
