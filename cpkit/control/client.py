"""The client's side of the control socket: one ZeroMQ socket per open request.

A call returns a result, or raises an error for one of five reasons: no reply within `deadline_s`
(the workers are busy, or do not answer), a rejected key, a closed client, a dead worker process, or
a connection that was lost in between.
Waiting calls check for dead processes ten times per second.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator
from itertools import count
from typing import TYPE_CHECKING, NoReturn, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from cpkit.control.errors import (
    BadRequest,
    Cancelled,
    ControlError,
    NoAnswer,
    RankHangs,
    RequestFailed,
    WorkersBusy,
    WorkersDied,
    checked,
    name_the_limit,
)
from cpkit.control.exit_report import exit_report
from cpkit.control.messages import (
    ENCRYPTION_BYTES,
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    TOO_MANY_FILES_CODE,
    Body,
    Cancel,
    Failed,
    Message,
    Progress,
    Queued,
    Reply,
    ReplyBody,
    Request,
    Sample,
    decode,
    encode,
)
from cpkit.control.runtime_dir import Connection, RuntimeDir
from cpkit.os_errors import SPARE_DESCRIPTORS, require_descriptors
from cpkit.processes import command
from cpkit.settings import deadline_s

if TYPE_CHECKING:
    from typing import Self

_DEADLINE_S = 30.0
_RANK_0_MARGIN_S = 3.0  # the other ranks end the workers, with a better error, before it has passed
_POLL_MS, _PAUSED_S = 100, 5.0
_WANTED_MS = 10  # how soon a stream ends that is not wanted any more
_SHORT_WAIT_S = 0.5  # shorter waits are not reported to `on_wait`
_PROGRESS_S = 1.0  # the least time between two calls of `on_progress`
_CONNECTED, _DISCONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED
_KEY_REJECTED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
_NO_HANDSHAKE = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
R = TypeVar("R", bound=Message)


def request_deadline_s() -> float:
    """Return the default deadline of a request: longer than the ranks' wait for each other."""
    return max(_DEADLINE_S, deadline_s() + _RANK_0_MARGIN_S)


class Client:
    """Sends requests to one set of workers. Thread-safe; a context manager that calls `close`.

    `on_wait`, if set, is called when a request has to wait, with the number of requests ahead.
    The constructor raises ControlError when the workers use another version of the protocol.
    """

    def __init__(self, connection: Connection) -> None:
        if connection.protocol != PROTOCOL_VERSION:
            raise ControlError(
                f"the workers {connection.name!r} run cpkit {connection.version} with protocol "
                f"{connection.protocol}; this cpkit uses protocol {PROTOCOL_VERSION}: stop them "
                f"with `{command('stop', connection.name)}` and start them again"
            )
        self.connection = connection
        self.on_wait: Callable[[int], None] | None = None
        self._runtime_dir = RuntimeDir(connection.name)
        self._session, self._numbers = uuid.uuid4().hex, count()  # see client_of
        self._idle: deque[_Socket] = deque()  # kept, because a CURVE handshake takes milliseconds
        self._waiting: set[str] = set()  # ids of requests without a result
        self._died: WorkersDied | None = None
        self._closed, self._pid = False, os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Waiting calls and later ones raise NoAnswer; the workers keep running."""
        self._closed = True
        self._close_idle_sockets()

    def call(
        self,
        body: Body,
        kind: type[R],
        deadline_s: float | None = None,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> R:
        """Send a request and return its result, of type `kind`. Raises the errors of `stream`.

        While the ranks work, `on_progress` is called in this thread about once per second. It must
        not wait for these workers. If it raises, the request is cancelled.
        """
        if not (on_progress is None or callable(on_progress)):
            raise BadRequest(f"on_progress is {on_progress!r}; pass a function, such as print")
        reported_s, latest = time.monotonic(), None
        with contextlib.closing(self.stream(body, deadline_s)) as replies:
            for reply in replies:
                if isinstance(reply, kind):
                    return reply
                if not isinstance(reply, Progress):
                    raise NoAnswer(f"the workers answered {body!r} with {type(reply).__name__}")
                latest = reply if reply.total else latest  # a keep-alive has no total
                if on_progress and latest and time.monotonic() - reported_s >= _PROGRESS_S:
                    on_progress(latest)
                    reported_s = time.monotonic()
        raise NoAnswer(f"the workers ended {body!r} without a result")

    def stream(
        self,
        body: Body,
        deadline_s: float | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Generator[ReplyBody, None, None]:
        """Send a request and yield its replies; the last one is the result.

        The request is cancelled if the generator is closed early, and soon after `wanted()` is
        false. Every reply renews the deadline. Raises BadRequest, Cancelled, RequestFailed,
        WorkersBusy, NoAnswer or WorkersDied.
        """
        limit_s = request_deadline_s() if deadline_s is None else deadline_s
        request = Request(uuid.uuid4().hex, limit_s, checked(body))
        try:
            data = encode(request)
        except (OverflowError, TypeError, ValueError) as error:
            raise BadRequest(f"this request cannot be sent: {error}") from error
        self._check_open()
        socket = self._take_socket()
        ended, usable = False, True
        self._waiting.add(request.id)
        try:
            socket.send(data)
            for reply in self._replies(socket, request, wanted):
                ended = not isinstance(reply, Progress | Sample)
                yield _result(reply)
                if ended:
                    return
        except (NoAnswer, WorkersDied):
            usable = ended  # an answer that a rank hangs is an answer
            raise
        finally:
            self._waiting.discard(request.id)
            if not ended:
                socket.send(encode(Request(uuid.uuid4().hex, _DEADLINE_S, Cancel(request.id))))
            if usable:  # the workers free what a client holds when it has no connection
                self._keep_socket(socket)
            else:
                socket.close()

    def _replies(
        self, socket: _Socket, request: Request, wanted: Callable[[], bool]
    ) -> Generator[ReplyBody, None, None]:
        """Yield the replies to `request` as they arrive, except Queued, while they are wanted."""
        ahead, reported = 0, True
        last_reply = time.monotonic()
        while wanted():
            self._check_open()
            began_s = time.monotonic()
            data = _receive(socket, wanted)
            if time.monotonic() - began_s > _PAUSED_S:  # this process was stopped, not the workers
                last_reply = time.monotonic()
            if data is None:
                self._check_alive()
                silence_s = time.monotonic() - last_reply
                if not reported and silence_s >= _SHORT_WAIT_S:
                    reported = True
                    if self.on_wait:
                        self.on_wait(ahead)
                if silence_s >= deadline_s() + _RANK_0_MARGIN_S:
                    check_rank_0(self.connection)
                if silence_s >= request.deadline_s:
                    raise _deadline_error(request.deadline_s, ahead, self.connection)
                continue
            reply = _decoded(data)
            unread = reply.id == "" and isinstance(reply.body, Failed)  # the id was not decoded
            if reply.id != request.id and not unread:  # of this socket's previous request
                continue
            if isinstance(reply.body, Queued):
                ahead, reported = reply.body.ahead, False
            else:
                ahead, reported = 0, True
                yield reply.body
            last_reply = time.monotonic()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise NoAnswer(
                "this client was made in another process, which has forked: its sockets do not "
                "work here. cpkit.connect() makes one for this process"
            )

    def _check_open(self) -> None:
        if self._died:
            raise self._died
        if self._closed:
            raise NoAnswer("this client was closed; cpkit.connect() opens a new one")

    def _check_alive(self) -> None:
        """Raise WorkersDied when a worker process has ended, now and in every later call."""
        death = exit_report(self._runtime_dir, self.connection)
        if death:
            self._died = death
            raise death

    def _take_socket(self) -> _Socket:
        self._check_process()
        try:
            socket = self._idle.pop()
        except IndexError:
            with name_the_limit():
                require_descriptors(SPARE_DESCRIPTORS)
                return _Socket(self.connection, f"{self._session}{next(self._numbers)}".encode())
        socket.forget_interruption()
        return socket

    def _keep_socket(self, socket: _Socket) -> None:
        self._idle.append(socket)
        if self._closed:  # `close` may have run in another thread before the append
            self._close_idle_sockets()

    def _close_idle_sockets(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class _Socket:
    """A DEALER with CURVE keys, and its monitor: was the key rejected, or the connection lost?"""

    def __init__(self, connection: Connection, routing_id: bytes) -> None:
        self._connection, self._endpoint = connection, connection.endpoint
        self._was_ended = False  # the connection, during its handshake
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._dealer = context.socket(zmq.DEALER)
        self._dealer.routing_id = routing_id
        self._dealer.curve_serverkey = connection.server_public_key.encode()
        self._dealer.curve_publickey = connection.client_public_key.encode()
        self._dealer.curve_secretkey = connection.client_secret_key.encode()
        self._dealer.maxmsgsize = MAX_MESSAGE_BYTES + ENCRYPTION_BYTES
        self._dealer.rcvhwm = 0  # no limit, so that a stream that is read late loses no sample
        self._dealer.heartbeat_ivl = HEARTBEAT_MS
        self._dealer.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        self._dealer.linger = 200
        self._monitor = self._dealer.get_monitor_socket(
            _CONNECTED | _DISCONNECTED | _KEY_REJECTED | _NO_HANDSHAKE
        )
        self._connected, self._interrupted = False, False
        self._dealer.connect(self._endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def send(self, data: bytes) -> None:
        """Send without blocking. After a rejected key, `data` is dropped and `receive` raises."""
        with contextlib.suppress(zmq.Again):
            self._dealer.send(data, zmq.NOBLOCK)

    def forget_interruption(self) -> None:
        """Ignore a connection that was lost while no request waited. ZeroMQ makes a new one."""
        while self._monitor.poll(0):
            self._observe(recv_monitor_message(self._monitor)["event"])
        self._interrupted = False

    def receive(self, timeout_ms: int) -> bytes | None:
        """Return the next message, or None after `timeout_ms`.

        Raises NoAnswer when the key is rejected, or after the connection was lost and made again.
        """
        ready = dict(self._poller.poll(timeout_ms))
        if self._dealer in ready:
            return self._dealer.recv()
        if self._monitor in ready:
            message = recv_monitor_message(self._monitor)
            event = message["event"]
            self._observe(event)
            if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self._was_ended:
                self._was_ended = True  # the server may have died; otherwise ZeroMQ tries again
                return None
            if event & (_KEY_REJECTED | _NO_HANDSHAKE):
                self._raise_rejection(event == _KEY_REJECTED, message["value"])
            if event == _CONNECTED and self._interrupted:
                raise NoAnswer(
                    f"the connection to the workers {self._connection.name!r} was lost and made "
                    f"again, because this process or its network paused for more than "
                    f"{HEARTBEAT_TIMEOUT_MS / 1000:g} s. The workers end this request and release "
                    f"the memory that was held for this client: send the request again"
                )
        return None

    def _observe(self, event: int) -> None:
        """Follow the state of the connection. Workers that have ended are never connected again."""
        self._interrupted |= event == _DISCONNECTED and self._connected
        if event in (_CONNECTED, _DISCONNECTED):
            self._connected = event == _CONNECTED

    def _raise_rejection(self, key_is_rejected: bool, code: int) -> NoReturn:
        check_rank_0(self._connection)  # a stopped process answers no handshake either
        if key_is_rejected and code == TOO_MANY_FILES_CODE:
            raise NoAnswer(
                f"the server at {self._endpoint} accepts no more connections, because rank 0 "
                f"has too many open files: close other clients, or start the workers with a "
                f"higher limit, for example after `ulimit -n 4096`"
            )
        problem = "rejected the client key" if key_is_rejected else "does not have the server key"
        other = "" if key_is_rejected else ", or rank 0 has no more free files: close other clients"
        raise NoAnswer(
            f"the server at {self._endpoint} {problem} of the connection file: the file "
            f"belongs to other workers. Connect again, or stop and start the workers{other}"
        )

    def close(self) -> None:
        """Free the socket. Messages already sent are still delivered in the background."""
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close()


def _receive(socket: _Socket, wanted: Callable[[], bool]) -> bytes | None:
    """Return the next message, or None after `_POLL_MS`, or soon after none is wanted."""
    for _ in range(_POLL_MS // _WANTED_MS):
        data = socket.receive(_WANTED_MS)
        if data is not None or not wanted():
            return data
    return None


def _decoded(data: bytes) -> Reply:
    try:
        return decode(data, Reply)
    except msgspec.DecodeError as error:
        raise NoAnswer(f"the workers sent an invalid reply: {error}") from error


def _result(reply: ReplyBody) -> ReplyBody:
    """Return the reply, or raise the error of a Failed."""
    if not isinstance(reply, Failed):
        return reply
    if reply.kind == "bad_request":
        raise BadRequest(reply.message)
    if reply.kind == "cancelled":
        raise Cancelled(reply.message)
    if reply.kind == "busy":
        raise WorkersBusy(f"the workers are busy: {reply.message}", ahead=1)
    if reply.kind == "hung":
        raise RankHangs(reply.message)
    prefix = "" if reply.rank is None else f"rank {reply.rank}: "
    raise RequestFailed(prefix + reply.message)


def _deadline_error(deadline_s: float, ahead: int, connection: Connection) -> ControlError:
    if ahead:
        return WorkersBusy(
            f"the workers are busy: {ahead} request(s) were ahead of this one for "
            f"{deadline_s:g} s. Try again later, or cancel the others.",
            ahead=ahead,
        )
    return RankHangs(
        f"no answer within {deadline_s:g} s from rank 0{_process_of_rank_0(connection)} of the "
        f"workers {connection.name!r} at {connection.endpoint}, although no process has ended. "
        f"cpkit.connect() ends these workers and starts new ones. The logs are in "
        f"{connection.log_dir}"
    )


def check_rank_0(connection: Connection) -> None:
    """Raise RankHangs when the process of rank 0 is on this machine and is stopped."""
    if not connection.workers or not connection.workers[0].process.is_stopped():
        return
    pid = connection.workers[0].process.pid
    raise RankHangs(
        f"rank 0{_process_of_rank_0(connection)} of the workers {connection.name!r} does not "
        f"respond: the process is stopped (state T). `kill -CONT {pid}` continues it; otherwise "
        f"cpkit.connect() ends these workers and starts new ones"
    )


def _process_of_rank_0(connection: Connection) -> str:
    if not connection.workers:
        return ""
    worker = connection.workers[0]
    return f" (process {worker.process.pid} on {worker.host})"
