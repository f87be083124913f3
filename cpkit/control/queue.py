"""Whose turn it is: requests wait here in the order they came.

One request is served at a time, because the ranks' processors are what is measured. An endless
measurement takes turns: after each sample it goes to the back of the line, so that a live plot in
one notebook does not lock another notebook out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from cpkit.control.requests import Body, Request


@dataclass(eq=False)
class Job:
    """A request of one client on its way to an answer."""

    number: int
    client: bytes
    request: Request
    begun: bool = False
    cancelled: bool = False
    not_before: float = 0.0  # an interval between two samples is time for others
    ahead: int = -1
    last_word: float = field(default_factory=time.monotonic)

    @property
    def body(self) -> Body:
        """What is asked."""
        return self.request.body

    def is_overdue(self) -> bool:
        """Whether its client has heard nothing for longer than it cares to wait."""
        return time.monotonic() - self.last_word > self.request.deadline_s


class JobQueue:
    """The line of jobs. Thread-safe: the server's thread adds, the work loop takes."""

    def __init__(self) -> None:
        self._line: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Jobs waiting or being served."""
        with self._changed:
            return len(self._line) + (self._current is not None)

    def current(self) -> Job | None:
        """The job that is being served."""
        with self._changed:
            return self._current

    def add(self, job: Job) -> None:
        """Put a job at the back of the line."""
        with self._changed:
            self._line.append(job)
            self._changed.notify()

    def take(self, timeout_s: float) -> Job | None:
        """The job whose turn it is; None when there is none for `timeout_s`."""
        give_up = time.monotonic() + timeout_s
        with self._changed:
            while not (job := self._first_ready()):
                wake = min([give_up, *(job.not_before for job in self._line)])
                wait_s = wake - time.monotonic()
                if wait_s <= 0 and wake == give_up:
                    return None
                self._changed.wait(max(wait_s, 0.0))
            self._line.remove(job)
            job.begun = True
            self._current = job
            return job

    def put_back(self, job: Job, *, front: bool) -> None:
        """The current job wants another turn: the next one, or one after all others."""
        with self._changed:
            self._current = None
            (self._line.appendleft if front or job.cancelled else self._line.append)(job)

    def done(self) -> None:
        """The current job has ended."""
        with self._changed:
            self._current = None

    def cancel(self, request_id: str) -> Job | None:
        """Mark a job as cancelled, and move it to the front if it has begun, to be ended at once.

        A job that has not begun leaves the line. None when there is no such job.
        """
        with self._changed:
            job = next((job for job in self._all() if job.request.id == request_id), None)
            if job:
                self._cancel(job)
            return job

    def cancel_where(self, client: bytes | None) -> list[Job]:
        """Cancel all jobs of a client (None: of everybody); those that had not begun."""
        with self._changed:
            jobs = [job for job in self._all() if client in (None, job.client)]
            for job in jobs:
                self._cancel(job)
            return [job for job in jobs if not job.begun]

    def expire(self) -> list[Job]:
        """Take the jobs out of the line that wait for longer than their deadline."""
        with self._changed:
            late = [job for job in self._line if not job.begun and job.is_overdue()]
            for job in late:
                self._line.remove(job)
            return late

    def waiting(self) -> list[tuple[Job, int]]:
        """Every job in the line with the number of jobs that are served before it.

        A cancelled one is not served any more: it ends with its step.
        """
        with self._changed:
            ahead = int(self._current is not None and not self._current.cancelled)
            line = []
            for job in self._line:
                line.append((job, ahead))
                ahead += not job.cancelled
            return line

    def has_id(self, request_id: str) -> bool:
        """Whether a request of this id is waiting or being served."""
        with self._changed:
            return any(job.request.id == request_id for job in self._all())

    def _first_ready(self) -> Job | None:
        now = time.monotonic()
        ready = (job for job in self._line if job.cancelled or job.not_before <= now)
        return next(ready, None)

    def _all(self) -> list[Job]:
        return [*self._line, *([self._current] if self._current else [])]

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        if job in self._line:
            self._line.remove(job)
            if job.begun:
                self._line.appendleft(job)
                self._changed.notify()
