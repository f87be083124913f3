"""Ranks, agents and nodes that are stopped, which no exit code shows; nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cpkit
from cpkit.control.runtime_dir import RuntimeDir
from tests.helpers import ROOT
from tests.helpers.leftovers import check_nothing_is_left, has_ended, pids
from tests.helpers.processes import LIMIT_S, until

pytestmark = pytest.mark.workers
DEADLINE_S = 2.0
SOON_S = DEADLINE_S + 8.0  # of a loaded machine; before heartbeats, some of these took minutes
HANG = """
import signal, time
def hang(*_, **__): time.sleep(3600)
def hang_in_new_group(*_):
    import torch.distributed
    torch.distributed.new_group = hang
signal.signal(signal.SIGUSR1, hang)
signal.signal(signal.SIGUSR2, hang_in_new_group)
"""


@pytest.fixture(autouse=True)
def nothing_is_left_behind(runtime_dir: Path) -> Iterator[None]:
    """After each test, no new process, segment, socket or connection file remains."""
    yield from check_nothing_is_left(runtime_dir)


@pytest.fixture(autouse=True)
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", f"{DEADLINE_S}")


def expect(error: type[Exception], words: str, call: Callable[[], object]) -> None:
    """Check that a call raises this error soon, with words that match."""
    start_s = time.monotonic()
    with pytest.raises(error, match=words):
        call()
    assert time.monotonic() - start_s < SOON_S


def test_a_stopped_rank_is_named_and_the_workers_recover_or_are_replaced(
    runtime_dir: Path,
) -> None:
    lab = cpkit.connect("stopped", nproc=2)
    first = pids(lab)
    assert lab.gather([64], 2).verified

    # Stopped for less than the deadline: no error, and the same processes.
    os.kill(first[1], signal.SIGSTOP)
    time.sleep(DEADLINE_S / 4)
    os.kill(first[1], signal.SIGCONT)
    assert lab.gather([64], 2).verified

    # Stopped for longer: the error of a stream names the rank, its process and its step.
    samples = lab.measure([1024], 2, algorithm="padded")
    next(samples)
    os.kill(first[1], signal.SIGSTOP)
    named = (
        rf"rank 1 \(process {first[1]} on .* step of `measure`: the process is stopped \(state T\)"
    )
    expect(cpkit.NoAnswer, named, lambda: deque(samples, maxlen=0))
    assert lab.status().state == "hung"
    expect(cpkit.NoAnswer, "rank 1 .*has not responded", lambda: lab.gather([64], 2))
    os.kill(first[1], signal.SIGCONT)
    until(lambda: lab.status().state == "idle", why="the ranks to recover")
    assert lab.gather([64], 2).verified
    assert pids(lab) == first

    # Not continued: it is detected while the ranks are idle, and `connect` replaces the workers.
    os.kill(first[1], signal.SIGSTOP)
    until(lambda: lab.status().state == "hung", SOON_S, "the stopped rank to be detected")
    expect(cpkit.NoAnswer, "rank 1 .*has not responded", lambda: lab.gather([64], 2))
    lab.close()
    with cpkit.connect("stopped", nproc=2) as lab:
        assert all(has_ended(pid) for pid in first)
        assert lab.gather([64], 2).verified

        # Rank 0 serves the socket, so the other ranks report it, and end the workers.
        stopped = pids(lab)[0]
        os.kill(stopped, signal.SIGSTOP)
        named = rf"rank 0 \(process {stopped} on .*has not responded for 2 s.*connect\(\) starts"
        expect(cpkit.WorkersDied, named, lambda: lab.gather([64], 2))


@pytest.mark.slow("more starts of workers; test_a_stopped_rank_is_named has the usual cases")
def test_workers_with_a_rank_that_stays_stopped_end_without_a_request(runtime_dir: Path) -> None:
    with cpkit.connect("idle", nproc=2) as lab:
        ranks = pids(lab)
        os.kill(ranks[1], signal.SIGSTOP)
        until(lambda: all(map(has_ended, ranks)), why="the workers to end")
        named = rf"rank 1 \(process {ranks[1]} on .*has not responded for 4 s: .*stopped"
        with pytest.raises(cpkit.WorkersDied, match=named) as caught:
            lab.gather([64], 2)
        assert caught.value.rank == 1


@pytest.mark.slow("more starts of workers; test_a_stopped_rank_is_named has the usual cases")
@pytest.mark.parametrize("victims", [(1,), (0, 1)])
def test_a_stopped_agent_whose_rank_dies_leaves_no_process(
    runtime_dir: Path, victims: tuple[int, ...]
) -> None:
    """Another rank continues it, although no client asks; after the last one, the next client."""
    with cpkit.connect("stopped-agent", nproc=2) as lab:
        agent, ranks = RuntimeDir("stopped-agent").agent().process.pid, pids(lab)
    os.kill(agent, signal.SIGSTOP)
    for victim in victims:
        os.kill(ranks[victim], signal.SIGKILL)
    until(lambda: all(has_ended(ranks[victim]) for victim in victims), why="the ranks to end")
    if len(victims) < len(ranks):
        until(lambda: all(map(has_ended, (agent, *ranks))), SOON_S, "agent and ranks to end")
    with cpkit.connect("stopped-agent", nproc=2) as lab:
        assert all(map(has_ended, (agent, *ranks)))
        lab.stop()


@pytest.mark.slow("more starts of workers; test_a_stopped_rank_is_named has the usual cases")
def test_a_single_rank_that_is_stopped_is_named_by_the_client(runtime_dir: Path) -> None:
    """No other rank can report it."""
    with cpkit.connect("single", nproc=1) as lab:
        stopped = pids(lab)[0]
        os.kill(stopped, signal.SIGSTOP)
        expect(cpkit.NoAnswer, rf"rank 0 \(process {stopped} on", lambda: lab.gather([64], 1))
    with cpkit.connect("single", nproc=1) as lab:
        assert has_ended(stopped)
        lab.stop()


@pytest.mark.slow("more starts of workers; test_a_stopped_rank_is_named has the usual cases")
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGUSR1, 1), (signal.SIGUSR2, 0)])
def test_a_rank_whose_step_does_not_end_is_named(
    runtime_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    victim: int,
) -> None:
    """Its heartbeats arrive. SIGUSR2: the other ranks wait while they make groups."""
    (tmp_path / "sitecustomize.py").write_text(HANG)
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    with cpkit.connect("endless", nproc=2) as lab:
        ranks = pids(lab)
        os.kill(ranks[victim], number)
        words = rf"rank {victim} \(process {ranks[victim]} .*`gather`: .* its step does not end"
        expect(cpkit.NoAnswer, words, lambda: lab.gather([64], 2))
        until(lambda: all(map(has_ended, ranks)), why="the workers to end")
        expect(cpkit.WorkersDied, f"rank {victim} ", lambda: lab.gather([64], 2))


@pytest.mark.slow("starts two nodes; test_a_stopped_rank_is_named has the error")
def test_a_lost_node_is_named_and_all_nodes_end(runtime_dir: Path) -> None:
    """All processes of the second node are stopped, as if its cable had been cut."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"--name nodes --nproc 1 --nnodes 2 --rdzv-endpoint 127.0.0.1:{port}"
    options += " --interface 127.0.0.1 --node-rank"
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "cpkit", "start", *options.split(), str(node)],
            cwd=ROOT,
            env={**os.environ, "CPKIT_HOST_ID": f"node{node}", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in (1, 0)
    ]
    assert [node.wait(LIMIT_S) for node in nodes] == [0, 0]
    with cpkit.connect("nodes", launch=False) as lab:
        assert lab.gather([64], 2, algorithm="padded").verified
        agents = [RuntimeDir(name).agent().process.pid for name in ("nodes", "nodes.node1")]
        ranks = pids(lab)
        for pid in (agents[1], ranks[1]):
            os.kill(pid, signal.SIGSTOP)
        named = rf"rank 1 \(process {ranks[1]} on .*during a step of `gather`"
        expect(cpkit.NoAnswer, named, lambda: lab.gather([64], 2, algorithm="padded", tensors=2))
        until(lambda: has_ended(ranks[0]) and has_ended(agents[0]), why="the first node to end")
        expect(cpkit.WorkersDied, "rank 1 ", lambda: lab.gather([64], 2))
        os.kill(agents[1], signal.SIGCONT)
        until(lambda: has_ended(agents[1]), why="the second node to end")
