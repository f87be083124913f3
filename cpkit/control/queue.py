"""The queue of requests: a queue per client, served in turn.

    client A   measure, gather       turns: A, B, C, A, B, C, …
    client B   sweep                 a turn is one step of one request
    client C   gather

One step runs at a time, because a second one would distort its times. After each step the next
client has its turn, so a long request of one notebook does not block another notebook. A client's
own requests run in order, but its measurements move to the back after each sample.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from cpkit.control.requests import Body, Request

MAX_JOBS, MAX_CLIENT_JOBS = 256, 16
MAX_BYTES, MAX_CLIENT_BYTES = 8 << 20, 2 << 20  # of requests as they were sent
CLIENT_ID_BYTES = 32


class QueueFull(RuntimeError):
    """No more requests are accepted for now, from this client or from any."""


def client_of(connection: bytes) -> bytes:
    """Return the client of a connection: the session id, with which its routing id begins.

    A client has a connection per open request.
    """
    return connection[:CLIENT_ID_BYTES]


@dataclass(eq=False)
class Job:
    """A client's request and its state in the queue.

    `connection` is the routing id to reply to, and `nbytes` the size of the request. The next step
    starts at `not_before` or later, so that other jobs run between two samples. `ahead` is the
    queue position last sent to the client. `postponed`: it has not started, because requests that
    run use the memory that it needs. Times are those of `time.monotonic`.
    """

    number: int
    connection: bytes
    request: Request
    nbytes: int = 0
    started: bool = False
    postponed: bool = False
    cancelled: bool = False
    not_before: float = 0.0
    ahead: int = -1
    last_reply: float = field(default_factory=time.monotonic)

    @property
    def client(self) -> bytes:
        """The client that sent the request."""
        return client_of(self.connection)

    @property
    def body(self) -> Body:
        """The operation that the client requests."""
        return self.request.body

    def is_overdue(self) -> bool:
        """Return True when the time since the last reply exceeds the request's deadline."""
        return time.monotonic() - self.last_reply > self.request.deadline_s


class JobQueue:
    """Waiting jobs and the current one. Thread-safe: the server adds, the scheduler takes."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Job]] = {}  # by client, in the order of their turns
        self._current: Job | None = None
        self._departed: list[bytes] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Return the number of jobs, the current one included."""
        with self._changed:
            return len(list(self._all()))

    def current(self) -> Job | None:
        """Return the job that was taken last and is not finished."""
        with self._changed:
            return self._current

    def add(self, job: Job) -> None:
        """Append a job. Raises QueueFull."""
        with self._changed:
            self._check_room(job)
            self._queue(job).append(job)
            self._changed.notify()

    def take(self, timeout_s: float) -> Job | None:
        """Make the first ready job of the next client the current one, and return it.

        Return None after `timeout_s`, or when a client has left.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (job := self._first_ready()):
                wake = min([deadline, *(job.not_before for job in self._waiting())])
                wait_s = wake - time.monotonic()
                if self._departed or (wait_s <= 0 and wake == deadline):
                    return None
                self._changed.wait(max(wait_s, 0.0))
            self._remove(job)
            if job.client in self._queues:  # the next turn is another client's
                self._queues[job.client] = self._queues.pop(job.client)
            job.started = True
            self._current = job
            return job

    def leave(self, client: bytes) -> None:
        """Record that a client has left."""
        with self._changed:
            self._departed.append(client)
            self._changed.notify()

    def departed(self) -> list[bytes]:
        """Return the clients that have left since the last call."""
        with self._changed:
            departed, self._departed = self._departed, []
            return departed

    def postpone(self, job: Job, wait_s: float) -> None:
        """Return the current job to the queue for a while, because it does not fit into memory."""
        job.started, job.postponed = False, True
        job.not_before = time.monotonic() + wait_s
        self.put_back(job, front=True)

    def put_back(self, job: Job, *, front: bool) -> None:
        """Return the current job to its client's queue, at the front or at the back."""
        with self._changed:
            self._current = None
            queue = self._queue(job)
            (queue.appendleft if front or job.cancelled else queue.append)(job)

    def finish(self) -> None:
        """Drop the current job."""
        with self._changed:
            self._current = None

    def cancel(self, request_id: str) -> Job | None:
        """Cancel the job of a request and return it, or None when there is none.

        A job that has not started leaves the queue. One that has started is the next to be taken,
        so that the scheduler ends it.
        """
        with self._changed:
            job = next((job for job in self._all() if job.request.id == request_id), None)
            if job:
                self._cancel(job)
            return job

    def cancel_all(self, connection: bytes | None = None) -> list[Job]:
        """Cancel all jobs of one connection or of all; return the jobs that had not started."""
        with self._changed:
            jobs = [job for job in self._all() if connection in (None, job.connection)]
            for job in jobs:
                self._cancel(job)
            return [job for job in jobs if not job.started]

    def remove_overdue(self) -> list[Job]:
        """Remove and return the jobs that have not started within their deadline."""
        with self._changed:
            overdue = [job for job in self._waiting() if not job.started and job.is_overdue()]
            for job in overdue:
                self._remove(job)
            return overdue

    def waiting(self) -> list[tuple[Job, int]]:
        """Return each waiting job with the number of jobs ahead of it.

        Cancelled jobs do not count, because they end without another step.
        """
        with self._changed:
            ahead = int(self._current is not None and not self._current.cancelled)
            waiting = []
            for job in chain.from_iterable(zip_longest(*self._queues.values())):
                if job:
                    waiting.append((job, max(ahead, int(job.postponed))))
                    ahead += not job.cancelled
            return waiting

    def has_id(self, request_id: str) -> bool:
        """Return True if a job has this request id."""
        with self._changed:
            return any(job.request.id == request_id for job in self._all())

    def _queue(self, job: Job) -> deque[Job]:
        return self._queues.setdefault(job.client, deque())

    def _remove(self, job: Job) -> None:
        queue = self._queues[job.client]
        queue.remove(job)
        if not queue:
            del self._queues[job.client]

    def _first_ready(self) -> Job | None:
        now = time.monotonic()
        cancelled = (job for job in self._waiting() if job.cancelled)
        ready = (job for job in self._waiting() if job.not_before <= now)
        return next(chain(cancelled, ready), None)

    def _waiting(self) -> Iterator[Job]:
        return chain.from_iterable(self._queues.values())

    def _all(self) -> Iterator[Job]:
        return chain(self._waiting(), [self._current] if self._current else [])

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        if not job.started:
            self._remove(job)
        self._changed.notify()

    def _check_room(self, job: Job) -> None:
        jobs = [*self._all(), job]
        mine = [each for each in jobs if each.client == job.client]
        for whose, some, most_jobs, most_bytes, advice in (
            ("this client has", mine, MAX_CLIENT_JOBS, MAX_CLIENT_BYTES, "wait for one to end"),
            ("all clients have", jobs, MAX_JOBS, MAX_BYTES, "try again later"),
        ):
            nbytes = sum(each.nbytes for each in some)
            if len(some) > most_jobs or nbytes > most_bytes:
                raise QueueFull(
                    f"with this request, {whose} {len(some)} open requests of {nbytes} bytes; at "
                    f"most {most_jobs} requests and {most_bytes} bytes are allowed: {advice}, or "
                    f"cancel one"
                )
