"""Workers that are started with a file of algorithms: what they offer, and which they refuse."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cpkit
from cpkit.control import launcher
from cpkit.control.runtime_dir import RuntimeDir
from cpkit.notebook.explorer import Explorer
from cpkit_lessons.stepper import Stepper
from tests.helpers import ROOT
from tests.helpers.leftovers import check_nothing_is_left, pids
from tests.helpers.processes import LIMIT_S, until

pytestmark = pytest.mark.workers
RING = ROOT / "examples" / "ring.py"
CHOICES = ("padded", "padded_symm_recv", "padded_symm", "direct", "plan", "ring", "late")
LATE = """

__all__ = ["ring", "late"]

def late(tensors, metadata, memory):
    if metadata.lengths == (33,):
        raise LookupError("late")
    outputs, path = ring(tensors, metadata, memory)
    return outputs, "no report" if metadata.lengths == (31,) else path
"""
WRONG_ON_RANK_1 = """
from cpkit.gather import padded

def mine(tensors, metadata, memory):
    outputs, path = padded(tensors, metadata, memory)
    if memory.group.rank == 1:
        outputs[1][2] = outputs[1][3]
    return outputs, path
"""
RAISES_ON_RANK_1 = """
from cpkit.gather import direct

def mine(tensors, metadata, memory):
    if memory.group.rank == 1:
        raise KeyError("no such rank")
    return direct(tensors, metadata, memory)
"""
SLOW = """
import time
from cpkit.gather import padded

def mine(tensors, metadata, memory):
    time.sleep(0.4)
    return padded(tensors, metadata, memory)
"""
HANGS_ON_RANK_1 = """
from cpkit.gather import direct

def mine(tensors, metadata, memory):
    while memory.group.rank == 1:
        pass
    return direct(tensors, metadata, memory)
"""


@pytest.fixture(autouse=True)
def nothing_is_left_behind(runtime_dir: Path) -> Iterator[None]:
    """After each test, no new process, segment, socket or connection file remains."""
    yield from check_nothing_is_left(runtime_dir)


def start(file: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpkit", "start", "--name", name, "--algorithms", str(file)]
    return subprocess.run(
        [*command, "--nproc", "2", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_an_own_algorithm_is_offered_wherever_the_others_are(
    runtime_dir: Path, tmp_path: Path
) -> None:
    own, changed = tmp_path / "own.py", tmp_path / "changed.py"
    own.write_text(RING.read_text() + LATE)
    changed.write_text(RING.read_text())
    started = start(own, "ring")
    assert started.returncode == 0, started.stderr
    with pytest.raises(cpkit.OtherWorkers, match=rf"asked for algorithms='{changed}', but"):
        launcher.attach("ring", algorithms=str(changed))
    launcher.attach("ring", algorithms=str(own)).close()
    with cpkit.connect("ring", launch=False) as lab:
        assert lab.status().algorithms == CHOICES
        assert "algorithms of your own: ring, late;" in lab.status().summary()
        for cp_size in (1, 2):
            assert lab.gather([97, 12], cp_size, algorithm="ring").path == "fallback"
        names = ["padded", "ring"]
        assert [each.algorithm for each in lab.measure([64], algorithms=names, samples=1)] == names
        table = lab.sweep(lengths=[[64]], algorithms=names, iterations=2)
        assert list(table["algorithm"]) == names
        assert lab.clock(["ring"], [64], iterations=2).times_us("ring").shape == (2, 2)
        assert "sends and receives" in lab.explain([64], algorithm="ring")["reason"][0]
        assert "wire" in set(lab.trace([64], algorithm="ring").table["stage"])
        with pytest.raises(cpkit.BadRequest, match=r"'rung'; .* plan, ring, late\. .*--algorithms"):
            lab.gather([64], algorithm="rung")
        with pytest.raises(
            cpkit.RequestFailed,
            match="a rank's report is invalid",
        ):
            lab.explain([31], algorithm="late")
        with pytest.raises(
            cpkit.RequestFailed, match=r"LookupError: late, at line \d+ of late: raise"
        ):
            lab.gather([33], algorithm="late")
        assert lab.gather([64], algorithm="ring").verified, "the workers live on"
        panel = lab.explore([64], algorithms=["direct", "ring"])
        until(lambda: "ring" in panel.summary_html, why="the panel to show its figures")
        panel.stop()
        assert tuple(panel.controls.algorithms.buttons) == CHOICES
        drawn = {trace.name: trace for trace in panel.panel.still().data}
        assert drawn["ring"].x
        assert Stepper(lab, [13, 9], 2).algorithm.options == CHOICES
        with pytest.raises(cpkit.BadRequest, match=r"'rung'\].*plan, ring"):
            Explorer(lab, [64], algorithms=["rung"])
        lab.stop()


@pytest.mark.slow("one more start of workers")
def test_a_slow_algorithm_is_verified_for_longer_than_one_deadline(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks outside the first group of 2 must not wait for it."""
    monkeypatch.setenv("CPKIT_DEADLINE_S", "4")
    file = tmp_path / "mine.py"
    file.write_text(SLOW)
    started = start(file, "slow", "--nproc", "4")
    assert started.returncode == 0, started.stderr
    cpkit.connect("slow", launch=False).stop()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (WRONG_ON_RANK_1, "mine.py: mine (cp_size 2, zigzag, .*on rank 1: slot 2 .* expected"),
        pytest.param(
            RAISES_ON_RANK_1,
            "on rank 1: KeyError: 'no such rank', at line 6 of mine: raise KeyError",
            marks=pytest.mark.slow("one more start of workers"),
        ),
        pytest.param(
            HANGS_ON_RANK_1,
            "it has not returned after 4 s; rank 0 is at line 7 of mine: .*; rank 1 is at line",
            marks=pytest.mark.slow("one more start of workers"),
        ),
    ],
)
def test_workers_with_a_wrong_algorithm_do_not_start(
    runtime_dir: Path, tmp_path: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the fault, and not the peers that it stopped."""
    monkeypatch.setenv("CPKIT_DEADLINE_S", "4")
    file = tmp_path / "mine.py"
    file.write_text(source)
    refused = start(file, "wrong")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"cpkit: the workers did not start: {file}: mine (cp_size 2")
    for each in words.split(".*"):
        assert each in refused.stderr
    assert "start the workers again" in refused.stderr


@pytest.mark.slow("starts workers twice; test_worker_hangs.py has the end of those that hang")
def test_workers_that_hang_are_replaced_with_their_algorithms(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", "4")
    assert start(RING, "again", "--max-restarts", "1").returncode == 0
    with cpkit.connect("again", launch=False) as lab:
        first = pids(lab)
        os.kill(first[1], signal.SIGKILL)  # torchrun then restarts the ranks
        until(lambda: RuntimeDir("again").startup_phases()["rank 1"] != "ready", why="a restart")
    with cpkit.connect("again", launch=False) as lab:
        assert lab.status().algorithms == CHOICES[:-1]
        os.kill(pids(lab)[1], signal.SIGSTOP)
        until(lambda: lab.status().state == "hung", why="the silence of rank 1 to be noticed")
    with cpkit.connect("again", nproc=2) as lab:
        assert lab.owned
        assert lab.status().algorithms == CHOICES[:-1]
        lab.stop()


@pytest.mark.slow("starts two nodes twice; tests/worker/test_own_algorithms.py has the check")
def test_nodes_agree_on_the_content_of_their_copies(runtime_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.py"
    copy.write_bytes(RING.read_bytes())
    assert [node.returncode for node in start_nodes(copy)] == [0, 0]
    with cpkit.connect("nodes", launch=False) as lab:
        gathered = lab.gather([64], 2, algorithm="ring")
        assert "a ring of sends" in gathered.path_reason
        lab.stop()
    copy.write_text(copy.read_text() + "# changed\n")
    first = start_nodes(copy)[1]
    assert first.returncode == 1
    assert f"nodes have different files (rank(s) 0: {RING}" in first.stderr


def start_nodes(copy: Path) -> list[subprocess.CompletedProcess[str]]:
    """Start node 1 with the copy, and node 0 with the example."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = f"--name nodes --nproc 1 --nnodes 2 --rdzv-endpoint {endpoint}".split()
    command = [sys.executable, "-m", "cpkit", "start", *options, "--interface", "127.0.0.1"]
    nodes = []
    for number, file in ((1, copy), (0, RING)):
        node = ["--node-rank", str(number), "--algorithms", str(file)]
        env = {**os.environ, "CPKIT_HOST_ID": f"node{number}", "GLOO_SOCKET_IFNAME": "lo"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen([*command, *node], cwd=ROOT, env=env, **pipes))
    done = []
    for node in nodes:
        out, error = node.communicate(timeout=LIMIT_S)
        done.append(subprocess.CompletedProcess(node.args, node.returncode, out, error))
    return done
