"""A notebook's end of the control socket: one thread owns the socket, callers get queues.

Every waiting call is told about one of four things: an answer, nothing for `deadline_s` (busy or no
answer), a refusal at the door (keys), or the death of a worker process, which the thread looks for
ten times a second while anybody waits.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from cpkit.control.errors import (
    BadRequest,
    Cancelled,
    ControlError,
    NoAnswer,
    RequestFailed,
    WorkersBusy,
)
from cpkit.control.exit_report import exit_report
from cpkit.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
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
from cpkit.control.waker import Waker

if TYPE_CHECKING:
    from typing import Self

DEADLINE_S = 30.0
_LOOK_EVERY_MS = 100
_SHORT_WAIT_S = 0.5  # not worth a word
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
_NO_HANDSHAKE = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
R = TypeVar("R", bound=Message)
Answers = queue.SimpleQueue[ReplyBody | ControlError]


class Client:
    """Requests to one set of workers. Thread-safe; `close` it, or use it as a context manager.

    Raises ControlError when the workers speak another version of the protocol.
    """

    def __init__(self, connection: Connection) -> None:
        if connection.protocol != PROTOCOL_VERSION:
            raise ControlError(
                f"the workers {connection.name!r} are of cpkit {connection.version} (protocol "
                f"{connection.protocol}), this is protocol {PROTOCOL_VERSION}: stop them with "
                f"`python -m cpkit stop --name {connection.name}` and start them again"
            )
        self.connection = connection
        self.on_wait: Callable[[int], None] | None = None
        self._place = RuntimeDir(connection.name)
        self._lock = threading.Lock()
        self._waiting: dict[str, Answers] = {}
        self._outbox: deque[bytes] = deque()
        self._broken: ControlError | None = None
        self._closing = False
        self._bell = Waker()
        self._context = zmq.Context()
        self._dealer = _dealer(self._context, connection)
        self._doorman = self._dealer.get_monitor_socket(_REFUSED | _NO_HANDSHAKE)
        self._dealer.connect(connection.endpoint)
        self._thread = threading.Thread(target=self._serve, name="cpkit client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop talking; calls that still wait get NoAnswer. The workers stay."""
        self._closing = True
        self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2)

    # ------------------------------------------------------------------ requests

    def call(self, body: Body, kind: type[R], deadline_s: float = DEADLINE_S) -> R:
        """Ask, wait, and return the result, which is a `kind`. Raises what `stream` raises."""
        with contextlib.closing(self.stream(body, deadline_s)) as replies:
            for reply in replies:
                if isinstance(reply, kind):
                    return reply
                if not isinstance(reply, Progress):
                    raise NoAnswer(f"the workers answered with {type(reply).__name__} to {body!r}")
        raise NoAnswer(f"the workers ended {body!r} without a result")

    def stream(
        self, body: Body, deadline_s: float = DEADLINE_S
    ) -> Generator[ReplyBody, None, None]:
        """Ask, and yield the replies; the last one is the result. Closing it early cancels.

        `deadline_s` is the longest silence. Raises BadRequest, Cancelled, RequestFailed,
        WorkersBusy, NoAnswer or WorkersDied.
        """
        request = Request(uuid.uuid4().hex, deadline_s, body)
        try:
            data = encode(request)  # before it counts as waiting: it may be too large
        except (OverflowError, TypeError, ValueError) as error:
            raise BadRequest(f"this request can't be sent: {error}") from error
        answers: Answers = queue.SimpleQueue()
        ended = False
        with self._lock:
            self._waiting[request.id] = answers
        self._send(data)
        try:
            for reply in self._replies(answers, deadline_s):
                ended = isinstance(reply, Failed) or not isinstance(reply, Progress | Sample)
                yield _result(reply)
                if ended:
                    return
        finally:
            with self._lock:
                del self._waiting[request.id]
            if not ended:
                self._send(encode(Request(uuid.uuid4().hex, DEADLINE_S, Cancel(request.id))))

    def _replies(self, answers: Answers, deadline_s: float) -> Generator[ReplyBody, None, None]:
        """The answers as they come. Queued is not passed on: `on_wait` hears of long waits."""
        ahead, told = 0, True
        while True:
            if self._broken:
                raise self._broken
            try:
                answer = answers.get(timeout=deadline_s if told else min(deadline_s, _SHORT_WAIT_S))
            except queue.Empty:
                if told or deadline_s <= _SHORT_WAIT_S:
                    raise _too_late(deadline_s, ahead, self.connection) from None
                told = True
                if self.on_wait:
                    self.on_wait(ahead)
                continue
            if isinstance(answer, ControlError):
                raise answer
            if isinstance(answer, Queued):
                ahead, told = answer.ahead, False
            else:
                ahead, told = 0, True
                yield answer

    def _send(self, data: bytes) -> None:
        self._outbox.append(data)
        self._bell.ring()

    # ---------------------------------------------------------------- the thread

    def _serve(self) -> None:
        poller = zmq.Poller()
        for readable in (self._dealer, self._doorman, self._bell):
            poller.register(readable, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(_LOOK_EVERY_MS if self._waiting else None))
            if self._bell.fileno() in ready:
                self._bell.silence()
            self._flush()
            if self._dealer in ready:
                self._receive()
            if self._doorman in ready:
                self._refused(int(recv_monitor_message(self._doorman)["event"]))
            if not ready and self._waiting:
                self._look_for_deaths()
        self._flush()
        self._break(NoAnswer("this client was closed"))
        self._dealer.disable_monitor()
        self._context.destroy(linger=200)
        self._bell.close()

    def _flush(self) -> None:
        """Send what can be sent; without a connection it waits here, or is dropped by `close`."""
        with contextlib.suppress(zmq.Again):
            while self._outbox:
                self._dealer.send(self._outbox[0], zmq.NOBLOCK)
                self._outbox.popleft()

    def _receive(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                data = self._dealer.recv(zmq.NOBLOCK)
                try:
                    self._deliver(decode(data, Reply))
                except msgspec.DecodeError as error:
                    self._break(NoAnswer(f"the workers sent what is no reply: {error}"))

    def _deliver(self, reply: Reply) -> None:
        with self._lock:
            answers = self._waiting.get(reply.id)
        if answers:
            answers.put(reply.body)

    def _refused(self, event: int) -> None:
        why = "refused the client key" if event == _REFUSED else "has not the server key"
        self._break(
            NoAnswer(
                f"who answers at {self.connection.endpoint} {why} of the connection file: the file "
                f"is of other workers. Connect again, or stop and start them."
            )
        )

    def _look_for_deaths(self) -> None:
        death = exit_report(self._place, self.connection)
        if death:
            self._break(death)

    def _break(self, error: ControlError) -> None:
        """No answer will ever come: tell all that wait and all that will ask."""
        with self._lock:
            self._broken = self._broken or error
            for answers in self._waiting.values():
                answers.put(error)


def _dealer(context: zmq.Context[zmq.Socket[bytes]], connection: Connection) -> zmq.Socket[bytes]:
    dealer = context.socket(zmq.DEALER)
    dealer.curve_serverkey = connection.server_public_key.encode()
    dealer.curve_publickey = connection.client_public_key.encode()
    dealer.curve_secretkey = connection.client_secret_key.encode()
    dealer.maxmsgsize = MAX_MESSAGE_BYTES
    dealer.heartbeat_ivl = 2_000
    dealer.heartbeat_timeout = 10_000
    dealer.linger = 200
    return dealer


def _result(reply: ReplyBody) -> ReplyBody:
    """The reply, or the error that it stands for."""
    if not isinstance(reply, Failed):
        return reply
    if reply.kind == "bad_request":
        raise BadRequest(reply.message)
    if reply.kind == "cancelled":
        raise Cancelled(reply.message)
    if reply.kind == "busy":
        raise WorkersBusy(f"the workers are busy: {reply.message}", ahead=1)
    where = "" if reply.rank is None else f"rank {reply.rank}: "
    raise RequestFailed(where + reply.message)


def _too_late(deadline_s: float, ahead: int, connection: Connection) -> ControlError:
    if ahead:
        return WorkersBusy(
            f"the workers are busy: {ahead} request(s) were ahead of this one for "
            f"{deadline_s:g} s. Try later, or cancel the others.",
            ahead=ahead,
        )
    return NoAnswer(
        f"no answer within {deadline_s:g} s from the workers {connection.name!r} at "
        f"{connection.endpoint}, though their processes live; logs are in {connection.log_dir}"
    )
