"""Rank 0's side of the control socket: a thread that receives requests and sends replies.

The thread answers `Status` and `Cancel` immediately, even while the ranks are busy. All other
requests wait in `jobs` for the scheduler, which answers through `reply`.
"""

from __future__ import annotations

import hmac
import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import chain, count

import msgspec
import zmq
from zmq.utils import z85

from cpkit.control.errors import explain_decode_error
from cpkit.control.gate import Gate
from cpkit.control.messages import (
    ENCRYPTION_BYTES,
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    TOO_MANY_FILES_CODE,
    Cancel,
    Done,
    Envelope,
    Failed,
    Progress,
    Queued,
    Reply,
    ReplyBody,
    Request,
    Shutdown,
    Status,
    StatusResult,
    decode,
    encode,
)
from cpkit.control.queue import Job, JobQueue, QueueFull, client_of
from cpkit.control.rate import BYTES_PER_S, RateLimit
from cpkit.control.waker import Waker
from cpkit.os_errors import SPARE_DESCRIPTORS, describe, require_descriptors

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by ZeroMQ's RFC 27
_MAX_UNREAD = 8  # messages that ZeroMQ stores per connection
_MAX_ID = 64
_KEEP_ALIVE_S = 1.0
_PROBE_S = 5.0
_TOO_FAST = (
    f"this client sends more than {BYTES_PER_S} bytes ({BYTES_PER_S >> 20} MiB) of requests per "
    f"second: send fewer or smaller requests"
)
_log = logging.getLogger("cpkit")


class Server:
    """Binds the control socket and serves it in a thread from `start` to `close`.

    The socket is the Unix socket `path`, and with `address` also a free TCP port of that address.
    `self.endpoint` is what clients connect to. `status` returns the reply to a Status request,
    given the number of jobs. While `refusal` is set, because a rank hangs, it is the reply to all
    other requests.
    """

    def __init__(
        self,
        path: str,
        secret_key: bytes,
        client_public_key: bytes,
        status: Callable[[int], StatusResult],
        address: str = "",
    ) -> None:
        self.jobs = JobQueue()
        self._rate = RateLimit()
        self._connections: defaultdict[bytes, set[bytes]] = defaultdict(set)  # by client
        self._last_words: dict[bytes, bytes] = {}  # of connections whose send queue was full
        self._next_probe_s = 0.0
        self.refusal: Failed | None = None
        self._status = status
        self._client_key = client_public_key
        self._job_numbers = count(1)
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        require_descriptors(2 * SPARE_DESCRIPTORS)
        self._waker = Waker()
        self._closing = False
        self._context = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(_ZAP_ENDPOINT)
        self._router = _router(self._context, secret_key)
        self._router.bind(f"ipc://{path}")
        self._gate = Gate(address, path) if address else None
        self.endpoint = self._gate.endpoint if self._gate else f"ipc://{path}"
        self._thread = threading.Thread(target=self._serve, name="cpkit control", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._thread.start()
        if self._gate:
            self._gate.start()

    def reply(self, job: Job, body: ReplyBody) -> None:
        """Send a reply to the job's client, from any thread.

        If the connection has ended, its jobs are cancelled.
        """
        job.last_reply = time.monotonic()
        self._outbox.append((job.connection, _pack(job.request.id, body)))
        self._waker.wake()

    def close(self) -> None:
        """Send the remaining replies, then stop the threads and free the socket."""
        self._closing = True
        self._waker.wake()
        self._thread.join(timeout=2)
        if self._gate:
            self._gate.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for readable in (self._router, self._zap, self._waker):
            poller.register(readable, zmq.POLLIN)
        while not (self._closing and not self._outbox):
            idle_ms = int(_PROBE_S * 1000) if self._connections else None
            ready = dict(poller.poll(200 if len(self.jobs) else idle_ms))
            if self._zap in ready:
                self._authenticate()
            if self._waker.fileno() in ready:
                self._waker.clear()
            if self._router in ready:
                self._receive()
            self._probe()
            self._update_clients()
            self._flush()
        self._context.destroy(linger=500)
        self._waker.close()

    def _authenticate(self) -> None:
        """Accept or reject a client's key for ZeroMQ (RFC 27). Only one key is accepted.

        While few descriptors are free, all clients are rejected, which closes their connections:
        ZeroMQ would end this process if a client connected and no descriptor were free.
        """
        version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
        code, text = 200, "OK"
        if not hmac.compare_digest(key, self._client_key):
            code, text = 400, "unknown key"
        elif problem := _descriptor_problem():
            code, text = TOO_MANY_FILES_CODE, problem
        answer = (str(code).encode(), text.encode())
        self._zap.send_multipart([version, request, *answer, b"cpkit", b""])
        if code != 200:
            _log.warning("rejected a client: %s", text)

    def _receive(self) -> None:
        for _ in range(100):  # a flood of requests must not delay replies and deadlines
            try:
                connection, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if self._rate.allows(client_of(connection), sum(map(len, frames))):
                answer = self._handle(connection, frames)
                self._connections[client_of(connection)].add(connection)
            else:  # its id is unknown, because the request is not decoded
                answer = Reply("", Failed("busy", _TOO_FAST))
            if answer:
                self._send(connection, _pack(answer.id, answer.body))

    def _send(self, connection: bytes, data: bytes) -> None:
        try:
            self._router.send_multipart([connection, data], zmq.NOBLOCK)
        except zmq.Again:  # too slow: its send queue is full
            self.jobs.cancel_all(connection)
            self._last_words[connection] = data
        except zmq.ZMQError as error:
            self.jobs.cancel_all(connection)
            if error.errno == zmq.EHOSTUNREACH:
                self._forget(connection)

    def _probe(self) -> None:
        """Send a message that clients ignore, because only sending shows who has disconnected.

        Or send the last words, which say that a request was cancelled.
        """
        if time.monotonic() >= self._next_probe_s:
            self._next_probe_s = time.monotonic() + _PROBE_S
            probe = _pack("", Progress(0, 0))
            for connection in [*chain.from_iterable(self._connections.values())]:
                self._send(connection, self._last_words.pop(connection, probe))

    def _forget(self, connection: bytes) -> None:
        """Drop a connection. A client without connections has left."""
        self._last_words.pop(connection, None)
        client = client_of(connection)
        mine = self._connections.get(client, set())
        mine.discard(connection)
        if not mine and self._connections.pop(client, None) is not None:
            self.jobs.leave(client)

    def _flush(self) -> None:
        while self._outbox:
            self._send(*self._outbox.popleft())

    def _update_clients(self) -> None:
        """Send queue positions and keep-alives, and end jobs that waited past their deadline."""
        if self.refusal:
            self._refuse(self.refusal)
            return
        for job in self.jobs.remove_overdue():
            why = f"with {job.ahead} request(s) ahead"
            if job.postponed:
                why = "for memory that other requests use: use fewer tokens, or cancel the others"
            self.reply(job, Failed("busy", f"waited {job.request.deadline_s:g} s {why}"))
        now = time.monotonic()
        current = self.jobs.current()
        if current and not current.postponed and now - current.last_reply > _KEEP_ALIVE_S:
            self.reply(current, Progress(0, 0, "running"))  # clients detect dead ranks on their own
        for job, ahead in self.jobs.waiting():
            moved = ahead != job.ahead and not job.started
            if moved or (job.started and now - job.last_reply > _KEEP_ALIVE_S):
                job.ahead = ahead
                if ahead:
                    self.reply(job, Queued(ahead))

    def _refuse(self, refusal: Failed) -> None:
        """Fail all jobs. The scheduler ends those that have started, if the ranks answer again."""
        current = self.jobs.current()
        for job in [*([current] if current else []), *(job for job, _ in self.jobs.waiting())]:
            if not job.cancelled:
                self.reply(job, refusal)
        self.jobs.cancel_all()

    def _handle(self, connection: bytes, frames: list[bytes]) -> Reply | None:
        data = frames[0] if len(frames) == 1 else b""
        try:
            envelope = decode(data, Envelope)
        except msgspec.DecodeError as error:
            return Reply("", Failed("bad_request", f"this is not a request: {error}"))
        if not 1 <= len(envelope.id) <= _MAX_ID:
            problem = (
                f"id has {len(envelope.id)} characters; it must have 1 to {_MAX_ID} characters"
            )
            return Reply("", Failed("bad_request", problem))
        if envelope.version != PROTOCOL_VERSION:
            return Reply(envelope.id, Failed("version", _wrong_version(envelope.version)))
        try:
            request = decode(data, Request)
            self._check(request)
        except msgspec.DecodeError as error:
            return Reply(envelope.id, Failed("bad_request", explain_decode_error(error)))
        except ValueError as error:
            return Reply(envelope.id, Failed("bad_request", str(error)))
        answer = self._answer(connection, request, len(data))
        return Reply(request.id, answer) if answer else None

    def _check(self, request: Request) -> None:
        if self.jobs.has_id(request.id):
            raise ValueError(
                f"id {request.id!r:.80} is in use by another request; choose a new one"
            )
        if not (math.isfinite(request.deadline_s) and request.deadline_s > 0):
            raise ValueError(
                f"deadline_s is {request.deadline_s}; it must be a positive, finite number"
            )

    def _answer(self, connection: bytes, request: Request, nbytes: int) -> ReplyBody | None:
        """Answer requests that need no rank; queue all others and return None."""
        match request.body:
            case Status():
                status = self._status(len(self.jobs))
                return msgspec.structs.replace(status, state="hung") if self.refusal else status
            case Cancel(target):
                return self._cancel(target)
            case Shutdown():
                for job in self.jobs.cancel_all():
                    self.reply(job, Failed("cancelled", "the workers are being stopped"))
        if self.refusal:
            return self.refusal
        try:
            self.jobs.add(Job(next(self._job_numbers), connection, request, nbytes))
        except QueueFull as error:
            return Failed("busy", str(error))
        return None

    def _cancel(self, target: str) -> Done:
        job = self.jobs.cancel(target)
        if job is None:
            return Done("no such request; it may have ended already")
        if not job.started:
            self.reply(job, Failed("cancelled", "cancelled before it started"))
        return Done("cancelled")


def _descriptor_problem() -> str:
    """Return what to do when few descriptors are free; empty when there are enough."""
    try:
        require_descriptors(SPARE_DESCRIPTORS)
    except OSError as error:
        return describe(error)
    return ""


def _router(context: zmq.Context[zmq.Socket[bytes]], secret_key: bytes) -> zmq.Socket[bytes]:
    router = context.socket(zmq.ROUTER)
    router.curve_server = True
    router.curve_secretkey = secret_key
    router.router_mandatory = True  # sending to a disconnected client raises
    router.router_handover = True  # a client that connects again keeps its routing id
    router.maxmsgsize = MAX_REQUEST_BYTES + ENCRYPTION_BYTES
    router.rcvhwm = _MAX_UNREAD
    router.heartbeat_ivl = HEARTBEAT_MS
    router.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    router.linger = 500
    return router


def _pack(request_id: str, body: ReplyBody) -> bytes:
    try:
        return encode(Reply(request_id, body))
    except ValueError as error:  # too large for a message
        return encode(Reply(request_id, Failed("internal", str(error))))


def _wrong_version(version: int) -> str:
    return (
        f"the client uses version {version} of the protocol, the workers use version "
        f"{PROTOCOL_VERSION}: use the cpkit that started them, or stop them and start them again"
    )
