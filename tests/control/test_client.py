"""What a client hears while it waits: busy, renewed, failed, cancelled, closed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from cpkit.control.errors import (
    BadRequest,
    Cancelled,
    NoAnswer,
    RequestFailed,
    WorkersBusy,
)
from cpkit.control.messages import (
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
    decode,
    encode,
)
from tests.helpers.control_server import WORKLOAD, ControlServer, in_background
from tests.helpers.processes import LIMIT_S, until


def test_status_is_answered_at_once_though_nobody_works(control_server: ControlServer) -> None:
    client = control_server.client()
    thread, said = in_background(client.call, Put(2), Done)
    until(lambda: client.call(Status(), StatusResult).ahead == 1, why="the request to be in line")
    assert not said
    client.close()
    thread.join()


def test_nobody_answers(tmp_path: Path, control_server: ControlServer) -> None:
    client = control_server.client(endpoint=f"ipc://{tmp_path}/nobody")
    with pytest.raises(NoAnswer, match=r"no answer within 0\.3 s.*the logs"):
        client.call(Status(), StatusResult, 0.3)


def test_who_waits_behind_others_is_told_and_then_the_workers_are_busy(
    control_server: ControlServer,
) -> None:
    first, second = control_server.client(), control_server.client()
    told: list[int] = []
    second.on_wait = told.append
    thread, _ = in_background(first.call, Put(2), Done)
    job = control_server.server.turns.take(LIMIT_S)
    assert job
    with pytest.raises(WorkersBusy, match=r"1 request\(s\)") as caught:
        second.call(Put(2), Done, 1.5)
    assert caught.value.ahead == 1
    assert told == [1]
    control_server.server.tell(job, Done())
    control_server.server.turns.done()
    thread.join()
    assert len(control_server.server.turns) == 0, "who gave up must not stay in the line"


def test_replies_renew_the_deadline(control_server: ControlServer) -> None:
    client = control_server.client()
    sample = Sample(WORKLOAD, 0, 1, (1.0,), (1.0,), (1.0,), {}, "symmetric", "")

    def work() -> None:
        job = control_server.server.turns.take(LIMIT_S)
        assert job
        for _ in range(3):  # longer than the deadline in all
            time.sleep(0.5)
            control_server.server.tell(job, sample)
        control_server.server.tell(job, Done())

    thread, _ = in_background(work)
    replies = list(client.stream(Measure(WORKLOAD), 1.2))
    assert [type(reply) for reply in replies] == [Sample] * 3 + [Done]
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
    control_server: ControlServer, failure: Failed, error: type[Exception], words: str
) -> None:
    thread, said = in_background(control_server.client().call, Put(2), Done)
    job = control_server.server.turns.take(LIMIT_S)
    assert job
    control_server.server.tell(job, failure)
    control_server.server.turns.done()
    thread.join()
    assert isinstance(said[0], error)
    assert words in str(said[0])


def test_closing_a_stream_cancels_it_and_so_does_a_client_that_goes(
    control_server: ControlServer,
) -> None:
    client = control_server.client()
    stream = client.stream(Measure(WORKLOAD))
    thread, _ = in_background(next, stream)
    job = control_server.server.turns.take(LIMIT_S)
    assert job
    control_server.server.tell(
        job, Sample(WORKLOAD, 0, 1, (1.0,), (1.0,), (1.0,), {}, "symmetric", "")
    )
    thread.join()
    stream.close()
    until(lambda: job.cancelled, why="the stream to be cancelled")

    gone = control_server.raw()
    gone.send(encode(Request("g", 30.0, Measure(WORKLOAD))))
    control_server.server.turns.done()
    job = control_server.server.turns.take(LIMIT_S)
    assert job
    gone.close()
    until(
        lambda: control_server.server.tell(job, Done()) or job.cancelled,
        why="the server to notice that the client is gone",
    )


def test_cancelling_what_waits_and_what_nobody_knows(control_server: ControlServer) -> None:
    dealer = control_server.raw()
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


def test_a_closed_client_says_so(control_server: ControlServer) -> None:
    client = control_server.client()
    thread, said = in_background(client.call, Put(2), Done, 30.0)
    assert control_server.server.turns.take(LIMIT_S)
    client.close()
    thread.join()
    assert isinstance(said[0], NoAnswer)
    assert "closed" in str(said[0])


def test_closing_is_quick_even_when_nobody_can_be_told(control_server: ControlServer) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = control_server.client(client_public_key=public, client_secret_key=secret)
    with pytest.raises(NoAnswer):
        stranger.call(Put(2), Done)
    thread, said = in_background(stranger.close)
    thread.join(LIMIT_S)
    assert said == [None], "it waits for an answer"
