"""Several clients of the same ranks: cancelled, scheduled in turn, and lost."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import cpkit
from cpkit.control.messages import Measure, Put, PutResult, Sweep
from cpkit.lab import Lab
from cpkit.worker import limits
from tests.helpers.control_server import in_background
from tests.helpers.processes import until

MB = 1_000_000
pytestmark = [pytest.mark.workers, pytest.mark.usefixtures("the_workers_stay_usable")]


def test_closing_an_endless_measurement_cancels_it(lab: Lab) -> None:
    stream = lab.measure([256], 4)
    next(stream)
    assert lab.status().state == "busy"
    stream.close()
    until(lambda: lab.status().state == "idle", why="the measurement to end")


def test_a_measurement_that_is_no_longer_wanted_ends(lab: Lab) -> None:
    wanted = iter([True] * 3)
    measured = lab.measure_workloads([lab.workload([256], 4)], wanted=lambda: next(wanted, False))
    assert 1 <= len(list(measured)) <= 3
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
    streams = [lab._client.stream(Measure(workloads[:1])) for _ in range(3)]
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


def test_what_a_client_holds_is_freed_when_it_leaves(lab: Lab) -> None:
    """Spilled segments too, between those that another client uses.

    But an arena keeps its size until the last client that needs it has left.
    """
    default = lab.pool.configure(None, 4)["arena_bytes"]
    lab.pool.configure(1 << 20, 2)
    with cpkit.connect(lab.name, launch=False) as second:
        with cpkit.connect(lab.name, launch=False) as first:
            first.pool.allocate(10_000_000, 2)
            lab.pool.allocate(20_000_000, 2)
            held = first.pool.allocate(30_000_000, 2)
            assert (held["segments"] == 4).all()
            assert "the arena has" in first.pool.warm_up(16_384, 4).attrs["note"]
            assert "large enough already" in second.pool.warm_up(16_384, 4).attrs["note"]
        until(lambda: list(lab.pool.stats(2)["live_blocks"]) == [1, 1], why="the blocks' release")
        kept = lab.pool.stats(2)
        assert (kept["segments"] == 2).all()
        assert (kept["spill_bytes"] < 30_000_000).all()
        assert (lab.pool.stats(4)["arena_bytes"] > default).all()
    until(lambda: lab.pool.stats(4)["arena_bytes"].equals(default), why="the default arena")
    assert lab.gather([4096], 2).verified
    assert "1 block" in lab.pool.release(2).attrs["note"]
    lab.pool.configure(None, 2)


@pytest.mark.slow("starts workers with a small limit; test_limits.py has the limits")
def test_all_clients_together_hold_no_more_than_the_limit(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPKIT_MEMORY_LIMIT_BYTES", f"{100 * MB}")
    with cpkit.connect("limited", nproc=2) as owner:
        clients = [cpkit.connect("limited", launch=False) for _ in range(4)]
        refused = [_allocate(client, 5 * MB) for client in clients for _ in range(6)]
        assert sum(not text for text in refused) == 7, "7 blocks of 10 MB, of 75 MB"
        assert "a client may hold 50000000 bytes" in refused[5]
        assert "all clients hold 70000000 bytes" in refused[-1]
        needed = limits.needed_bytes(owner.workload(512, 2))
        with pytest.raises(cpkit.WorkersBusy, match=r"clients hold 70000000 bytes .* in pools"):
            owner.gather(512 * (40 * MB // needed), 2)
        for client in clients:
            client.close()
        tokens = 512 * (60 * MB // needed)
        until(lambda: _gathers(owner, tokens), why="the blocks to be freed")

        samples = owner.measure(tokens, 2)
        next(samples)
        with cpkit.connect("limited", launch=False) as other:
            assert other.gather(512, 2).verified, "it fits beside the measurement"
            thread, outcome = in_background(other.gather, tokens, 2)
            thread.join(1)
            assert thread.is_alive(), "it waits for the memory of the measurement"
            next(samples)
            samples.close()
            thread.join()
            assert outcome[0].verified
        owner.stop()


def _allocate(lab: Lab, nbytes: int) -> str:
    try:
        lab.pool.allocate(nbytes, 2)
    except (cpkit.BadRequest, cpkit.WorkersBusy) as error:
        return str(error)
    return ""


def _gathers(lab: Lab, tokens: int) -> bool:
    try:
        return lab.gather(tokens, 2).verified
    except cpkit.WorkersBusy:
        return False


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
