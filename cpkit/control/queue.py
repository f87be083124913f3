"""The queue of requests: first in, first out, but round-robin for measurements.

One request runs at a time, because a second one would distort the times of the first one. After
each sample, a measurement moves to the back of the queue, so that a live plot in one notebook does
not block the requests of another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from cpkit.control.requests import Body, Request


@dataclass(eq=False)
class Job:
    """A client's request and its state in the queue.

    The next step starts at `not_before` or later, so that other jobs run between two samples.
    `ahead` is the queue position last sent to the client. Times are those of `time.monotonic`.
    """

    number: int
    client: bytes
    request: Request
    started: bool = False
    cancelled: bool = False
    not_before: float = 0.0
    ahead: int = -1
    last_reply: float = field(default_factory=time.monotonic)

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
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Return the number of jobs, the current one included."""
        with self._changed:
            return len(self._waiting) + (self._current is not None)

    def current(self) -> Job | None:
        """Return the job that was taken last and is not finished."""
        with self._changed:
            return self._current

    def add(self, job: Job) -> None:
        """Append a job."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def take(self, timeout_s: float) -> Job | None:
        """Make the first ready job the current one and return it; None after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (job := self._first_ready()):
                wake = min([deadline, *(job.not_before for job in self._waiting)])
                wait_s = wake - time.monotonic()
                if wait_s <= 0 and wake == deadline:
                    return None
                self._changed.wait(max(wait_s, 0.0))
            self._waiting.remove(job)
            job.started = True
            self._current = job
            return job

    def put_back(self, job: Job, *, front: bool) -> None:
        """Return the current job to the queue, at the front or at the back."""
        with self._changed:
            self._current = None
            (self._waiting.appendleft if front or job.cancelled else self._waiting.append)(job)

    def finish(self) -> None:
        """Drop the current job."""
        with self._changed:
            self._current = None

    def cancel(self, request_id: str) -> Job | None:
        """Cancel the job of a request and return it, or None when there is none.

        A job that has not started leaves the queue. One that has started moves to the front, so
        that the scheduler ends it next.
        """
        with self._changed:
            job = next((job for job in self._all() if job.request.id == request_id), None)
            if job:
                self._cancel(job)
            return job

    def cancel_all(self, client: bytes | None = None) -> list[Job]:
        """Cancel all jobs of one client or of all; return the jobs that had not started."""
        with self._changed:
            jobs = [job for job in self._all() if client in (None, job.client)]
            for job in jobs:
                self._cancel(job)
            return [job for job in jobs if not job.started]

    def remove_overdue(self) -> list[Job]:
        """Remove and return the jobs that are past their deadline and have not started."""
        with self._changed:
            overdue = [job for job in self._waiting if not job.started and job.is_overdue()]
            for job in overdue:
                self._waiting.remove(job)
            return overdue

    def waiting(self) -> list[tuple[Job, int]]:
        """Return each waiting job with the number of jobs ahead of it.

        Cancelled jobs do not count, because they end without another step.
        """
        with self._changed:
            ahead = int(self._current is not None and not self._current.cancelled)
            waiting = []
            for job in self._waiting:
                waiting.append((job, ahead))
                ahead += not job.cancelled
            return waiting

    def has_id(self, request_id: str) -> bool:
        """Return True if a job has this request id."""
        with self._changed:
            return any(job.request.id == request_id for job in self._all())

    def _first_ready(self) -> Job | None:
        now = time.monotonic()
        ready = (job for job in self._waiting if job.cancelled or job.not_before <= now)
        return next(ready, None)

    def _all(self) -> list[Job]:
        return [*self._waiting, *([self._current] if self._current else [])]

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
            if job.started:
                self._waiting.appendleft(job)
                self._changed.notify()
