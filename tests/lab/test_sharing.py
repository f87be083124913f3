"""Several clients of the same ranks: cancelled, interrupted, queued, and lost."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
import time

import pytest

import cpkit
from cpkit.control import launcher
from cpkit.control.messages import Put, PutResult
from cpkit.lab import Lab
from tests.helpers.processes import until

pytestmark = [pytest.mark.workers, pytest.mark.usefixtures("the_workers_stay_usable")]


def test_closing_an_endless_measurement_cancels_it(lab: Lab) -> None:
    stream = lab.measure([256], 4)
    next(stream)
    assert lab.status().state == "busy"
    stream.close()
    until(lambda: lab.status().state == "idle", why="the measurement to end")


def test_an_interrupt_cancels_and_keeps_the_workers(lab: Lab) -> None:
    threading.Timer(0.5, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in lab.measure([256], 4):
            pass
    workers = {worker.pid for worker in lab.status().workers}
    assert lab.gather([64], 4).verified
    assert workers == {worker.pid for worker in lab.status().workers}


def test_a_second_notebook_is_told_how_many_are_ahead(lab: Lab) -> None:
    sweep = threading.Thread(target=lab.sweep, kwargs={"lengths": [2048], "iterations": 40})
    sweep.start()
    while lab.status().state == "idle":
        time.sleep(0.005)
    with launcher.require(lab.name) as client:
        told: list[int] = []
        client.on_wait = told.append
        assert client.call(Put(4, 10), PutResult).reads > 0
    sweep.join()
    assert told == [1]


def test_an_endless_measurement_does_not_lock_others_out(lab: Lab) -> None:
    stream = lab.measure([256], 2)
    next(stream)
    with cpkit.connect(lab.name, launch=False) as other:
        for cp_size in (1, 2, 4):
            assert other.gather([64], cp_size).verified
        mine, theirs = next(stream), next(other.measure([64], 4, samples=1))
    assert (mine.workload.cp_size, theirs.workload.cp_size) == (2, 4)
    assert next(stream).sequence >= 2
    stream.close()


def test_many_threads_may_ask_at_once(lab: Lab) -> None:
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(lab.gather([32 + n], 4)))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.lengths[0] for result in results) == [32 + n for n in range(6)]


def test_a_notebook_that_vanishes_does_not_keep_the_workers_busy(lab: Lab) -> None:
    code = f"""
import cpkit, time
samples = cpkit.connect({lab.name!r}, launch=False).measure([256], 4)
next(samples)
print("measuring", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as notebook:
        assert notebook.stdout
        assert notebook.stdout.readline() == b"measuring\n"
        notebook.kill()
    until(lambda: lab.status().state == "idle", why="the server to notice the client is gone")


def test_connect_attaches_to_who_runs(lab: Lab) -> None:
    with cpkit.connect(lab.name) as other:
        assert other.world_size == 4
        assert list(other.status().workers) == list(lab.status().workers)
    with pytest.raises(cpkit.NoWorkers, match="cpkit start --name nobody"):
        cpkit.connect("nobody", launch=False)
