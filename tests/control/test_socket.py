"""Keys, garbage and invalid requests over a real Unix socket, and over TCP; no workers run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from cpkit.control.errors import ControlError, NoAnswer
from cpkit.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Failed,
    Put,
    Reply,
    Request,
    Status,
    StatusResult,
    decode,
    encode,
)
from tests.helpers.control_server import ControlServer


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
        msgspec.msgpack.encode({"id": "x" * ((1 << 24) - 60), "version": 1}),
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
    dealer.rcvtimeo = 300
    dealer.send(bytes(MAX_MESSAGE_BYTES + 1))
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
