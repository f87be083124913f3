"""The queue of requests: a queue per client, served in turn, with limits per client and in all."""

from __future__ import annotations

import threading
import time

import pytest

from cpkit.control.messages import Measure, Put, Request, Workload
from cpkit.control.queue import (
    MAX_BYTES,
    MAX_CLIENT_BYTES,
    MAX_CLIENT_JOBS,
    MAX_JOBS,
    Job,
    JobQueue,
    QueueFull,
    client_of,
)

MEASURE = Measure((Workload(2, (16,)),))


def job(number: int, client: bytes = b"a", deadline_s: float = 30.0, nbytes: int = 1) -> Job:
    return Job(number, client, Request(f"r{number}", deadline_s, Put(2)), nbytes)


def positions(queue: JobQueue) -> list[tuple[int, int]]:
    return [(job.number, ahead) for job, ahead in queue.waiting()]


def filled(count: int) -> tuple[JobQueue, list[Job]]:
    queue, jobs = JobQueue(), [job(n) for n in range(count)]
    for each in jobs:
        queue.add(each)
    return queue, jobs


def test_jobs_are_taken_in_order_and_counted_from_the_front() -> None:
    queue, jobs = filled(3)
    assert positions(queue) == [(0, 0), (1, 1), (2, 2)]
    assert queue.take(0) is jobs[0]
    assert positions(queue) == [(1, 1), (2, 2)]
    queue.finish()
    assert positions(queue) == [(1, 0), (2, 1)]
    assert len(queue) == 2


def test_a_job_that_goes_to_the_back_lets_the_others_run() -> None:
    queue, jobs = filled(2)
    order = []
    for _ in range(4):
        taken = queue.take(0)
        order.append(taken.number)
        queue.put_back(taken, front=False)
    assert order == [0, 1, 0, 1]
    first = queue.take(0)
    queue.put_back(jobs[0], front=True)
    assert queue.take(0) is first


def test_clients_have_turns_and_each_keeps_its_order() -> None:
    """However many requests a client has, and also while it returns to the front of its queue."""
    queue = JobQueue()
    for number in range(8):
        queue.add(job(number, b"greedy"))
    queue.add(job(10, b"b"))
    queue.add(job(11, b"b"))
    queue.add(job(20, b"c"))
    assert [number for number, _ in positions(queue)] == [0, 10, 20, 1, 11, 2, 3, 4, 5, 6, 7]
    order = []
    for _ in range(10):
        taken = queue.take(0)
        order.append(taken.number)
        if taken.number in (0, 10):  # long requests
            queue.put_back(taken, front=True)
        else:
            queue.finish()
    assert order == [0, 10, 20, 0, 10, 0, 10, 0, 10, 0]


def test_a_client_is_the_session_of_its_connections() -> None:
    session, other = b"0" * 32, b"1" * 32
    assert client_of(session + b"7") == client_of(session + b"18") == session
    queue = JobQueue()
    for number in range(4):
        queue.add(job(number, session + b"%d" % number))
    queue.add(job(9, other + b"0"))
    assert [number for number, _ in positions(queue)] == [0, 9, 1, 2, 3]


def test_a_client_has_a_share_of_the_queue() -> None:
    queue = JobQueue()
    for number in range(MAX_CLIENT_JOBS):
        queue.add(job(number))
    queue.take(0)  # a request that runs is open too
    with pytest.raises(QueueFull, match=rf"client has {MAX_CLIENT_JOBS + 1} .*cancel one"):
        queue.add(job(99))
    queue.add(job(99, b"b"))
    with pytest.raises(QueueFull, match=rf"{MAX_CLIENT_BYTES + 1} bytes; .*{MAX_CLIENT_BYTES} byt"):
        queue.add(job(100, b"b", nbytes=MAX_CLIENT_BYTES))
    queue.finish()
    queue.add(job(100))


def test_all_clients_together_have_a_limit() -> None:
    for limit, nbytes in ((MAX_JOBS, 1), (MAX_BYTES // MAX_CLIENT_BYTES, MAX_CLIENT_BYTES)):
        queue = JobQueue()
        for number in range(limit):
            queue.add(job(number, b"%d" % number, nbytes=nbytes))
        with pytest.raises(QueueFull, match=r"all clients have .*try again later"):
            queue.add(job(999, b"late"))


def test_an_interval_leaves_time_for_other_jobs() -> None:
    queue, jobs = filled(2)
    jobs[0].not_before = time.monotonic() + 0.5
    assert queue.take(0) is jobs[1]
    queue.finish()
    assert queue.take(0) is None
    assert queue.take(60) is jobs[0]
    assert time.monotonic() >= jobs[0].not_before


def test_a_new_job_wakes_a_waiting_take() -> None:
    queue = JobQueue()
    threading.Timer(0.05, queue.add, [job(7)]).start()
    started = time.monotonic()
    assert queue.take(60).number == 7
    assert time.monotonic() - started < 30


def test_cancelling_removes_a_waiting_job_and_marks_a_started_one() -> None:
    queue, jobs = filled(3)
    queue.take(0)
    assert queue.cancel("r2") is jobs[2]
    assert positions(queue) == [(1, 1)]
    assert queue.cancel("r0") is jobs[0]
    assert jobs[0].cancelled
    assert queue.cancel("r9") is None


def test_a_cancelled_job_is_taken_next_despite_its_interval() -> None:
    queue, jobs = filled(2)
    queue.take(0)
    jobs[0].not_before = time.monotonic() + 60
    queue.put_back(jobs[0], front=False)
    queue.cancel("r0")
    assert queue.take(0) is jobs[0]


def test_all_jobs_of_a_connection_can_be_cancelled() -> None:
    queue, jobs = filled(2)
    other = job(5, client=b"b")
    queue.add(other)
    assert queue.cancel_all(b"a") == jobs
    assert positions(queue) == [(5, 0)]


def test_overdue_jobs_are_removed() -> None:
    queue = JobQueue()
    patient, overdue = job(1), job(2, deadline_s=0.01)
    queue.add(patient)
    queue.add(overdue)
    time.sleep(0.03)
    assert queue.remove_overdue() == [overdue]
    assert positions(queue) == [(1, 0)]


def test_a_cancelled_job_does_not_count_as_ahead() -> None:
    queue, jobs = filled(3)
    assert queue.take(1.0) is jobs[0]
    assert positions(queue) == [(1, 1), (2, 2)]
    queue.cancel("r0")  # during its last step
    assert positions(queue) == [(1, 0), (2, 1)]
    queue.put_back(jobs[0], front=False)  # to be ended by the scheduler
    assert positions(queue) == [(0, 0), (1, 0), (2, 1)]
