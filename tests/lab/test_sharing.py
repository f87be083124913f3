"""Several clients of the same ranks: cancelled, scheduled in turn, and lost."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import cpkit
from cpkit.control.messages import Measure, Put, PutResult, Sweep
from cpkit.lab import Lab
from tests.helpers.processes import until

pytestmark = [pytest.mark.workers, pytest.mark.usefixtures("the_workers_stay_usable")]


def test_closing_an_endless_measurement_cancels_it(lab: Lab) -> None:
    stream = lab.measure([256], 4)
    next(stream)
    assert lab.status().state == "busy"
    stream.close()
    until(lambda: lab.status().state == "idle", why="the measurement to end")


def test_an_endless_measurement_does_not_block_other_clients(lab: Lab) -> None:
    stream = lab.measure([256], 2)
    next(stream)
    with cpkit.connect(lab.name, launch=False) as other:
        for cp_size in (1, 2, 4):
            assert other.gather([64], cp_size).verified
        mine, theirs = next(stream), next(other.measure([64], 4, samples=1))
    assert (mine.workload.cp_size, theirs.workload.cp_size) == (2, 4)
    assert next(stream).sequence >= 2
    stream.close()


def test_a_long_sweep_and_measurements_do_not_delay_another_client(lab: Lab) -> None:
    workloads = tuple(lab.workload(64 + n, 4) for n in range(1000))
    streams = [lab._client.stream(Measure(workloads[0])) for _ in range(3)]
    streams.append(lab._client.stream(Sweep(workloads, 10_000)))
    for stream in streams:
        next(stream)
    with cpkit.connect(lab.name, launch=False) as other:
        for _ in range(3):
            start_s = time.monotonic()
            assert other.gather([64], 2).verified
            assert time.monotonic() - start_s < 5
    for stream in streams:
        stream.close()


def test_a_killed_notebook_does_not_keep_the_workers_busy(lab: Lab) -> None:
    code = f"""
import cpkit, time
samples = cpkit.connect({lab.name!r}, launch=False).measure([256], 4)
next(samples)
print("measuring", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as notebook:
        assert notebook.stdout.readline() == b"measuring\n"
        notebook.kill()
    until(lambda: lab.status().state == "idle", why="the server to notice the client is gone")


def test_connect_attaches_to_running_workers(lab: Lab) -> None:
    with cpkit.connect(lab.name) as other:
        assert other.world_size == 4
        assert list(other.status().workers) == list(lab.status().workers)
    with pytest.raises(cpkit.NoWorkers, match="cpkit start --name nobody"):
        cpkit.connect("nobody", launch=False)


def test_long_work_reports_progress(lab: Lab) -> None:
    """The work takes longer than the deadline, but replies arrive more often."""
    assert lab._client.call(Put(4, 30_000), PutResult, deadline_s=1.5).stale == 0
