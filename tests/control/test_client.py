"""What ends a waiting call (busy, an error, cancellation, close), and what renews its deadline."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec
import psutil
import pytest
import zmq

from cpkit.control.client import _Socket
from cpkit.control.errors import (
    BadRequest,
    Cancelled,
    ControlError,
    NoAnswer,
    RankHangs,
    RequestFailed,
    WorkersBusy,
)
from cpkit.control.messages import (
    Cancel,
    Done,
    Failed,
    Measure,
    Progress,
    Put,
    Reply,
    Request,
    Sample,
    Status,
    StatusResult,
    decode,
    encode,
)
from cpkit.timing import CALL_TIME
from tests.helpers.control_server import WORKLOAD, ControlServer, in_background
from tests.helpers.processes import LIMIT_S, until

SAMPLE = Sample(WORKLOAD, 0, 1, CALL_TIME, (1.0,), (1.0,), (1.0,), (1.0,), {}, "symmetric", "")


def test_no_server_listens(tmp_path: Path, control_server: ControlServer) -> None:
    client = control_server.client(endpoint=f"ipc://{tmp_path}/unbound")
    with pytest.raises(NoAnswer, match=r"no answer within 0\.3 s.*the logs"):
        client.call(Status(), StatusResult, 0.3)


def test_a_client_without_descriptors_names_the_limit_and_recovers(
    control_server: ControlServer,
) -> None:
    client = control_server.client()
    used, limits = psutil.Process().num_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 8  # enough for the poll of the server's thread, and fewer than are open
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        with pytest.raises(ControlError, match=rf"limit of this process is {few}.*ulimit -n"):
            client.call(Status(), StatusResult)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert psutil.Process().num_fds() == used
    assert client.call(Status(), StatusResult).name == "test"


FIRST_CALL_WITH_FEW_DESCRIPTORS = """
import os, resource, sys
import msgspec
from cpkit.control.client import Client
from cpkit.control.errors import ControlError
from cpkit.control.messages import Status, StatusResult
from cpkit.control.runtime_dir import Connection

client = Client(msgspec.json.decode(sys.argv[1], type=Connection))
few = len(os.listdir("/proc/self/fd")) + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
try:
    print(client.call(Status(), StatusResult).name)
except ControlError as error:
    print(error)
"""


@pytest.mark.parametrize("free", [4, 10, 40])
def test_the_first_call_of_a_process_with_few_descriptors_ends_with_an_error(
    control_server: ControlServer, free: int
) -> None:
    """Without a reserve, ZeroMQ ends the process when it starts its threads."""
    connection = msgspec.json.encode(control_server.connection()).decode()
    command = [sys.executable, "-c", FIRST_CALL_WITH_FEW_DESCRIPTORS, connection, str(free)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("test" if free == 40 else "too many open files") in done.stdout


def test_a_server_with_few_descriptors_rejects_new_clients_and_recovers(
    control_server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_free(count: int) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    old, new = control_server.client(), control_server.client()
    assert old.call(Status(), StatusResult).name == "test"
    with monkeypatch.context() as full:
        full.setattr("cpkit.control.server.require_descriptors", none_free)
        with pytest.raises(NoAnswer, match=r"rank 0 has too many open files.*ulimit -n"):
            new.call(Status(), StatusResult)
        assert old.call(Status(), StatusResult).name == "test"
    assert new.call(Status(), StatusResult).name == "test"


def test_a_queued_request_reports_its_position_and_then_raises_busy(
    control_server: ControlServer,
) -> None:
    first, second = control_server.client(), control_server.client()
    reported: list[int] = []
    second.on_wait = reported.append
    thread, _ = in_background(first.call, Put(2), Done)
    job = control_server.server.jobs.take(LIMIT_S)
    with pytest.raises(WorkersBusy, match=r"1 request\(s\)") as caught:
        second.call(Put(2), Done, 1.5)
    assert caught.value.ahead == 1
    assert reported == [1]
    control_server.server.reply(job, Done())
    control_server.server.jobs.finish()
    thread.join()
    assert len(control_server.server.jobs) == 0, "a request past its deadline must leave the queue"


def test_a_request_that_waits_for_memory_raises_busy(control_server: ControlServer) -> None:
    """It does not raise NoAnswer, after which connect() would end the workers."""
    jobs, client = control_server.server.jobs, control_server.client()
    thread, outcome = in_background(client.call, Put(2), Done, 1.2)
    end_s = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < end_s:
        job = jobs.take(0.1)
        if job:
            time.sleep(0.3)  # checks of the memory
            jobs.postpone(job, 0.2)
    assert outcome, "the checks must not renew the deadline"
    assert isinstance(outcome[0], WorkersBusy)
    until(lambda: len(jobs) == 0, why="the request to leave the queue")


def test_replies_renew_the_deadline(control_server: ControlServer) -> None:
    client = control_server.client()

    def work() -> None:
        job = control_server.server.jobs.take(LIMIT_S)
        for _ in range(3):  # longer in total than the deadline
            time.sleep(0.5)
            control_server.server.reply(job, SAMPLE)
        control_server.server.reply(job, Done())

    thread, _ = in_background(work)
    replies = list(client.stream(Measure((WORKLOAD,)), 1.2))
    assert [type(reply) for reply in replies] == [Sample] * 3 + [Done]
    thread.join()


def test_a_stream_that_is_not_wanted_ends_without_another_reply(
    control_server: ControlServer,
) -> None:
    client, wanted = control_server.client(), [True]

    def work() -> None:
        control_server.server.reply(control_server.server.jobs.take(LIMIT_S), SAMPLE)

    thread, _ = in_background(work)
    stream = client.stream(Measure((WORKLOAD,)), wanted=lambda: bool(wanted))
    assert isinstance(next(stream), Sample)
    wanted.clear()
    assert list(stream) == []
    assert not client._waiting, "it is cancelled"
    thread.join()


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (Failed("bad_request", "no such thing"), BadRequest, "no such thing"),
        (Failed("cancelled", "stopped"), Cancelled, "stopped"),
        (Failed("busy", "full"), WorkersBusy, "full"),
        (Failed("internal", "it broke", 3), RequestFailed, "rank 3: it broke"),
        (Failed("hung", "rank 1 is stopped"), RankHangs, "rank 1 is stopped"),
    ],
)
def test_each_kind_of_failure_has_its_own_error(
    control_server: ControlServer, failure: Failed, error: type[Exception], words: str
) -> None:
    client = control_server.client()
    thread, outcome = in_background(client.call, Put(2), Done)
    control_server.answer(failure)
    thread.join()
    assert isinstance(outcome[0], error)
    assert words in str(outcome[0])
    assert client._idle, "the client stays connected, so the workers keep what it holds"


def test_closing_a_stream_cancels_it_and_so_does_disconnecting(
    control_server: ControlServer,
) -> None:
    client = control_server.client()
    stream = client.stream(Measure((WORKLOAD,)))
    thread, _ = in_background(next, stream)
    job = control_server.server.jobs.take(LIMIT_S)
    control_server.server.reply(job, SAMPLE)
    thread.join()
    stream.close()
    until(lambda: job.cancelled, why="the stream to be cancelled")

    leaver = control_server.raw()
    leaver.send(encode(Request("g", 30.0, Measure((WORKLOAD,)))))
    job = control_server.server.jobs.take(LIMIT_S)
    leaver.close()
    until(
        lambda: control_server.server.reply(job, Done()) or job.cancelled,
        why="the server to notice the disconnected client",
    )


def test_a_client_has_left_when_all_its_connections_have_ended(
    control_server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it closes a stream, nor while it waits."""
    monkeypatch.setattr("cpkit.control.server._PROBE_S", 0.05)
    jobs, leaver, other = control_server.server.jobs, control_server.client(), control_server.raw()
    stream = leaver.stream(Measure((WORKLOAD,)))
    thread, _ = in_background(next, stream)
    job = jobs.take(LIMIT_S)
    control_server.server.reply(job, SAMPLE)
    thread.join()
    stream.close()
    until(lambda: job.cancelled, why="the stream to be cancelled")
    jobs.finish()
    other.send(encode(Request("o", 30.0, Status())))
    for _ in range(10):  # probes; a client ignores them
        assert decode(other.recv(), Reply).id in ("o", "")
    assert jobs.departed() == []
    assert leaver.call(Status(), StatusResult).name == "test"
    thread, _ = in_background(leaver.call, Put(2), Done)
    until(lambda: len(jobs) == 1, why="a request")
    leaver.close()
    assert jobs.take(LIMIT_S).client == job.client
    start_s = time.monotonic()
    assert jobs.take(LIMIT_S) is None
    assert time.monotonic() - start_s < LIMIT_S / 2, "the wait ends when a client leaves"
    assert jobs.departed() == [job.client]
    assert jobs.departed() == []
    thread.join()
    other.close()


def test_a_connection_that_is_lost_ends_the_request_and_the_next_one_works(tmp_path: Path) -> None:
    control_server = ControlServer(tmp_path, "127.0.0.1")
    client, gate = control_server.client(), control_server.server._gate

    def cut() -> None:
        for connection in gate._connections:
            connection.cancel()

    try:
        waiting, outcome = in_background(client.call, Put(2), Done, LIMIT_S)
        job = control_server.server.jobs.take(LIMIT_S)
        gate._loop.call_soon_threadsafe(cut)
        waiting.join(LIMIT_S / 4)
        assert isinstance(outcome[0], NoAnswer)
        assert "was lost and made again" in str(outcome[0])
        until(
            lambda: control_server.server.reply(job, Done()) or job.cancelled,
            why="the server to cancel the request",
        )
        assert client.call(Status(), StatusResult).name == "test"
        gate._loop.call_soon_threadsafe(cut)  # while no request waits
        until(lambda: client._idle[0]._monitor.poll(0), why="the client to notice")
        assert client.call(Status(), StatusResult).name == "test"
    finally:
        control_server.close()


def test_a_client_that_reads_too_slowly_learns_that_its_request_was_cancelled(
    control_server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpkit.control.server._PROBE_S", 0.05)
    slow = control_server.raw()
    slow.send(encode(Request("slow", LIMIT_S, Measure((WORKLOAD,)))))
    job = control_server.server.jobs.take(LIMIT_S)
    end_s = time.monotonic() + LIMIT_S
    while not job.cancelled and time.monotonic() < end_s:  # until the send queue is full
        control_server.server.reply(job, SAMPLE)
    control_server.server.reply(job, Failed("cancelled", "not read"))
    control_server.server.jobs.finish()
    while isinstance(decode(slow.recv(), Reply).body, Progress | Sample):
        pass
    slow.close()


def test_progress_is_reported_at_most_once_per_interval_and_not_lost_to_keep_alives(
    control_server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpkit.control.client._PROGRESS_S", 0.3)
    lines: list[Progress] = []
    thread, outcome = in_background(
        control_server.client().call, Put(2), Done, LIMIT_S, lines.append
    )
    job = control_server.server.jobs.take(LIMIT_S)
    keep_alive, third = Progress(0, 0, "running"), Progress(3, 9, "rounds")
    steps = (  # what is sent after so many seconds, and what has then been reported
        (0.0, [Progress(1, 9, "rounds"), keep_alive], []),
        (0.5, [third, *[Progress(4, 9, "rounds")] * 20], [third]),
        (0.5, [keep_alive], [third, Progress(4, 9, "rounds")]),
    )
    for pause_s, replies, reported in steps:
        time.sleep(pause_s)
        for reply in replies:
            control_server.server.reply(job, reply)
        until(lambda: lines == reported, why=f"{reported} to be reported")  # noqa: B023
    control_server.server.reply(job, Done("served"))
    control_server.server.jobs.finish()
    thread.join()
    assert outcome == [Done("served")]
    assert len(lines) == 2


def test_a_request_whose_progress_raises_is_cancelled_at_once(
    control_server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpkit.control.client._PROGRESS_S", 0.0)
    thread, outcome = in_background(
        control_server.client().call, Put(2), Done, LIMIT_S, {}.__getitem__
    )
    job = control_server.server.jobs.take(LIMIT_S)
    control_server.server.reply(job, Progress(1, 9, "rounds"))
    thread.join()
    assert isinstance(outcome[0], (KeyError, TypeError))
    until(lambda: job.cancelled, why="the request to be cancelled")


def test_a_pause_of_this_process_is_not_the_workers_silence(
    control_server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpkit.control.client._PAUSED_S", 0.3)
    receive, pauses = _Socket.receive, [0.7]

    def paused(socket: _Socket, timeout_ms: int) -> bytes | None:
        time.sleep(pauses.pop() if pauses else 0)
        return receive(socket, timeout_ms)

    monkeypatch.setattr(_Socket, "receive", paused)
    thread, outcome = in_background(control_server.client().call, Put(2), Done, 0.5)
    job = control_server.server.jobs.take(LIMIT_S)
    time.sleep(0.8)
    control_server.server.reply(job, Done("served"))
    thread.join()
    assert outcome == [Done("served")]


def test_cancelling_a_waiting_and_an_unknown_request(control_server: ControlServer) -> None:
    dealer = control_server.raw()
    dealer.send(encode(Request("w", 30.0, Put(2))))
    dealer.send(encode(Request("c", 1.0, Cancel("w"))))
    outcome = {reply.id: reply.body for reply in (decode(dealer.recv(), Reply) for _ in range(2))}
    assert outcome["c"] == Done("cancelled")
    assert outcome["w"].kind == "cancelled"
    dealer.send(encode(Request("d", 1.0, Cancel("w"))))
    assert "no such request" in decode(dealer.recv(), Reply).body.text
    dealer.close()


def test_calls_that_wait_when_the_client_is_closed_raise(control_server: ControlServer) -> None:
    client = control_server.client()
    thread, outcome = in_background(client.call, Put(2), Done, 30.0)
    assert control_server.server.jobs.take(LIMIT_S)
    client.close()
    thread.join()
    assert isinstance(outcome[0], NoAnswer)
    assert "closed" in str(outcome[0])


def test_closing_is_quick_after_a_rejected_key(control_server: ControlServer) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = control_server.client(client_public_key=public, client_secret_key=secret)
    with pytest.raises(NoAnswer):
        stranger.call(Put(2), Done)
    thread, outcome = in_background(stranger.close)
    thread.join(LIMIT_S)
    assert outcome == [None], "close must not wait for an answer"


def test_a_client_does_not_work_in_a_forked_process(control_server: ControlServer) -> None:
    client = control_server.client()
    assert client.call(Status(), StatusResult).name == "test"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            client.call(Status(), StatusResult)
        except NoAnswer as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert b"made in another process" in os.read(reader, 1000)
    os.close(reader)
    assert client.call(Status(), StatusResult).name == "test"


def test_threads_share_a_client(control_server: ControlServer) -> None:
    """Each open request has its own socket, also within one thread."""
    client = control_server.client()
    jobs = control_server.server.jobs
    waiting = [in_background(client.call, Put(2), Done) for _ in range(4)]
    stream = client.stream(Measure((WORKLOAD,)))
    waiting.append(in_background(next, stream))
    until(lambda: len(jobs) == 5, why="all requests to be queued")
    assert client.call(Status(), StatusResult).ahead == 5
    while len(jobs):
        job = jobs.take(LIMIT_S)
        control_server.server.reply(job, Done(type(job.body).__name__))
        jobs.finish()
    for thread, _ in waiting:
        thread.join()
    texts = [outcome[0].text for _, outcome in waiting if isinstance(outcome[0], Done)]
    assert texts == ["Put"] * 4 + ["Measure"]


def test_a_late_reply_to_the_previous_request_is_ignored(control_server: ControlServer) -> None:
    client = control_server.client()
    for text in ("first", "second"):
        thread, outcome = in_background(client.call, Put(2), Done)
        control_server.answer(Done(text), Done("late"))
        thread.join()
        assert outcome == [Done(text)]
