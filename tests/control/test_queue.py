"""The line of requests: first come, first served, and endless measurements take turns."""

from __future__ import annotations

import threading
import time

from cpkit.control.messages import Measure, Put, Request, Workload
from cpkit.control.queue import Job, JobQueue

MEASURE = Measure(Workload(2, (16,)))


def job(number: int, client: bytes = b"a", deadline_s: float = 30.0) -> Job:
    return Job(number, client, Request(f"r{number}", deadline_s, Put(2)))


def line(turns: JobQueue) -> list[tuple[int, int]]:
    return [(job.number, ahead) for job, ahead in turns.waiting()]


def filled(count: int) -> tuple[JobQueue, list[Job]]:
    turns, jobs = JobQueue(), [job(n) for n in range(count)]
    for each in jobs:
        turns.add(each)
    return turns, jobs


def test_first_come_first_served_and_each_knows_how_many_are_ahead() -> None:
    turns, jobs = filled(3)
    assert line(turns) == [(0, 0), (1, 1), (2, 2)]
    assert turns.take(0) is jobs[0]
    assert line(turns) == [(1, 1), (2, 2)]
    turns.done()
    assert line(turns) == [(1, 0), (2, 1)]
    assert len(turns) == 2


def test_who_goes_to_the_back_lets_the_others_in() -> None:
    turns, jobs = filled(2)
    order = []
    for _ in range(4):
        taken = turns.take(0)
        assert taken
        order.append(taken.number)
        turns.put_back(taken, front=False)
    assert order == [0, 1, 0, 1]
    first = turns.take(0)
    turns.put_back(jobs[0], front=True)
    assert turns.take(0) is first


def test_an_interval_leaves_time_for_others() -> None:
    turns, jobs = filled(2)
    jobs[0].not_before = time.monotonic() + 0.5
    assert turns.take(0) is jobs[1]
    turns.done()
    assert turns.take(0) is None
    assert turns.take(60) is jobs[0]
    assert time.monotonic() >= jobs[0].not_before


def test_a_new_job_wakes_who_waits() -> None:
    turns = JobQueue()
    threading.Timer(0.05, turns.add, [job(7)]).start()
    started = time.monotonic()
    taken = turns.take(60)
    assert taken
    assert time.monotonic() - started < 30


def test_cancelling_removes_who_waits_and_marks_who_has_begun() -> None:
    turns, jobs = filled(3)
    turns.take(0)
    assert turns.cancel("r2") is jobs[2]
    assert line(turns) == [(1, 1)]
    assert turns.cancel("r0") is jobs[0]
    assert jobs[0].cancelled
    assert turns.cancel("r9") is None


def test_a_cancelled_job_that_rests_comes_next_to_be_ended() -> None:
    turns, jobs = filled(2)
    turns.take(0)
    jobs[0].not_before = time.monotonic() + 60
    turns.put_back(jobs[0], front=False)
    turns.cancel("r0")
    assert turns.take(0) is jobs[0]


def test_a_client_that_is_gone_takes_its_jobs_along() -> None:
    turns, jobs = filled(2)
    mine = job(5, client=b"b")
    turns.add(mine)
    assert turns.cancel_where(b"a") == jobs
    assert line(turns) == [(5, 0)]


def test_waiting_for_longer_than_the_deadline_ends_it() -> None:
    turns = JobQueue()
    patient, hasty = job(1), job(2, deadline_s=0.01)
    turns.add(patient)
    turns.add(hasty)
    time.sleep(0.03)
    assert turns.expire() == [hasty]
    assert line(turns) == [(1, 0)]


def test_a_cancelled_job_is_not_ahead_of_anybody() -> None:
    turns, jobs = filled(3)
    assert turns.take(1.0) is jobs[0]
    assert line(turns) == [(1, 1), (2, 2)]
    turns.cancel("r0")  # in the middle of its last step
    assert line(turns) == [(1, 0), (2, 1)]
    turns.put_back(jobs[0], front=False)  # back only to be told that it is over
    assert line(turns) == [(0, 0), (1, 0), (2, 1)]
