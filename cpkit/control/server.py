"""Rank 0's end of the control socket: a thread that answers at once, and a line for the rest.

`Status` and `Cancel` are answered by the thread, also while the ranks are busy. All else waits in
`turns` for the work loop, which answers through `tell`.
"""

from __future__ import annotations

import hmac
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count

import msgspec
import zmq
from zmq.utils import z85

from cpkit.control.complaints import in_words
from cpkit.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
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
from cpkit.control.queue import Job, JobQueue
from cpkit.control.waker import Waker

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by ZeroMQ's RFC 27
_MAX_WAITING = 64
_MAX_ID = 64
_KEEP_ALIVE_S = 1.0
_log = logging.getLogger("cpkit")


class Server:
    """The control socket, bound and served by a thread until `close`.

    `endpoint` may end in `:*` for a free TCP port; `self.endpoint` is what was bound.
    """

    def __init__(
        self,
        endpoint: str,
        secret_key: bytes,
        client_public_key: bytes,
        status: Callable[[int], StatusResult],
    ) -> None:
        self.turns = JobQueue()
        self._status = status
        self._client_key = client_public_key
        self._numbers = count(1)
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._bell = Waker()
        self._closing = False
        self._context = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(_ZAP_ENDPOINT)
        self._router = _router(self._context, secret_key)
        self._router.bind(endpoint)
        self.endpoint = str(self._router.get_string(zmq.LAST_ENDPOINT))
        self._thread = threading.Thread(target=self._serve, name="cpkit control", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def tell(self, job: Job, body: ReplyBody) -> None:
        """Send a reply to the job's client, from any thread; one that is gone cancels its jobs."""
        job.last_word = time.monotonic()
        self._outbox.append((job.client, _packed(job.request.id, body)))
        self._bell.ring()

    def close(self) -> None:
        """Send what is still to be sent, then stop."""
        self._closing = True
        self._bell.ring()
        self._thread.join(timeout=2)

    # ------------------------------------------------------------- the thread

    def _serve(self) -> None:
        poller = zmq.Poller()
        for readable in (self._router, self._zap, self._bell):
            poller.register(readable, zmq.POLLIN)
        while not (self._closing and not self._outbox):
            ready = dict(poller.poll(200 if len(self.turns) else None))
            if self._zap in ready:
                self._admit()
            if self._bell.fileno() in ready:
                self._bell.silence()
            if self._router in ready:
                self._receive()
            self._mind_the_line()
            self._flush()
        self._context.destroy(linger=500)
        self._bell.close()

    def _admit(self) -> None:
        """ZeroMQ asks whether a client's key is welcome (RFC 27); exactly one is."""
        version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
        welcome = hmac.compare_digest(key, self._client_key)
        code, text = (b"200", b"OK") if welcome else (b"400", b"unknown key")
        self._zap.send_multipart([version, request, code, text, b"cpkit", b""])
        if not welcome:
            _log.warning("refused a client with an unknown key")

    def _receive(self) -> None:
        for _ in range(100):  # then let others have a look at the clock
            try:
                client, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            answer = self._handle(client, frames)
            if answer:
                self._send(client, _packed(answer.id, answer.body))

    def _send(self, client: bytes, data: bytes) -> None:
        try:
            self._router.send_multipart([client, data], zmq.NOBLOCK)
        except zmq.ZMQError:  # gone, or so slow that a thousand replies wait for it
            self.turns.cancel_where(client)

    def _flush(self) -> None:
        while self._outbox:
            self._send(*self._outbox.popleft())

    def _mind_the_line(self) -> None:
        """Tell those that wait how many are ahead, and give up those that waited for too long."""
        for job in self.turns.expire():
            waited = f"waited {job.request.deadline_s:g} s with {job.ahead} request(s) ahead"
            self.tell(job, Failed("busy", waited))
        now = time.monotonic()
        current = self.turns.current()
        if current and now - current.last_word > _KEEP_ALIVE_S:
            self.tell(current, Progress(0, 0, "at work"))  # a long step; deaths are told otherwise
        for job, ahead in self.turns.waiting():
            moved = ahead != job.ahead and not job.begun
            if moved or (job.begun and now - job.last_word > _KEEP_ALIVE_S):
                job.ahead = ahead
                if ahead:
                    self.tell(job, Queued(ahead))

    # ------------------------------------------------------------ the requests

    def _handle(self, client: bytes, frames: list[bytes]) -> Reply | None:
        data = frames[0] if len(frames) == 1 else b""
        try:
            envelope = decode(data, Envelope)
        except msgspec.DecodeError as error:
            return Reply("", Failed("bad_request", f"this is no request: {error}"))
        if not 1 <= len(envelope.id) <= _MAX_ID:
            return Reply("", Failed("bad_request", f"id must have 1 to {_MAX_ID} characters"))
        if envelope.version != PROTOCOL_VERSION:
            return Reply(envelope.id, Failed("version", _wrong_version(envelope.version)))
        try:
            request = decode(data, Request)
            self._check(request)
        except msgspec.DecodeError as error:
            return Reply(envelope.id, Failed("bad_request", in_words(error)))
        except ValueError as error:
            return Reply(envelope.id, Failed("bad_request", str(error)))
        answer = self._answer(client, request)
        return Reply(request.id, answer) if answer else None

    def _check(self, request: Request) -> None:
        if self.turns.has_id(request.id):
            raise ValueError(f"id {request.id!r} is in use by another request")
        if not (math.isfinite(request.deadline_s) and request.deadline_s > 0):
            raise ValueError(f"deadline_s is {request.deadline_s}; it must be a positive number")

    def _answer(self, client: bytes, request: Request) -> ReplyBody | None:
        """Answer what can be answered at once; put all else in the line."""
        match request.body:
            case Status():
                return self._status(len(self.turns))
            case Cancel(target):
                return self._cancel(target)
            case Shutdown():
                for job in self.turns.cancel_where(None):
                    self.tell(job, Failed("cancelled", "the workers were told to end"))
        if len(self.turns) >= _MAX_WAITING:
            return Failed("busy", f"{_MAX_WAITING} requests wait already; no more are taken")
        self.turns.add(Job(next(self._numbers), client, request))
        return None

    def _cancel(self, target: str) -> Done:
        job = self.turns.cancel(target)
        if job is None:
            return Done("no such request; it may have ended already")
        if not job.begun:
            self.tell(job, Failed("cancelled", "cancelled while it waited"))
        return Done("cancelled")


def _router(context: zmq.Context[zmq.Socket[bytes]], secret_key: bytes) -> zmq.Socket[bytes]:
    router = context.socket(zmq.ROUTER)
    router.curve_server = True
    router.curve_secretkey = secret_key
    router.router_mandatory = True  # so that we notice when a client is gone
    router.maxmsgsize = MAX_MESSAGE_BYTES
    router.heartbeat_ivl = 2_000
    router.heartbeat_timeout = 10_000
    router.linger = 500
    return router


def _packed(request_id: str, body: ReplyBody) -> bytes:
    try:
        return encode(Reply(request_id, body))
    except ValueError as error:  # larger than a message may be
        return encode(Reply(request_id, Failed("internal", str(error))))


def _wrong_version(theirs: int) -> str:
    return (
        f"the client speaks version {theirs} of the protocol, the workers version "
        f"{PROTOCOL_VERSION}: use the cpkit that started them, or stop them and start them again"
    )
