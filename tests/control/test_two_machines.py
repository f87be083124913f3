"""Two machines: network namespaces joined by a cable, with their own host names and /dev/shm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.processes import left_after, processes_with

DEADLINE_S = 5
LIMIT_S = 180.0
SLEEP = ["sleep", "600"]  # holds the namespaces, and ends by itself
pytestmark = [
    pytest.mark.workers,
    pytest.mark.slow("starts two nodes; test_worker_hangs.py has a lost node on one machine"),
]
SETUP = """
hostname "machine$0"
mount -t tmpfs -o size=256m tmpfs /dev/shm
ip link set lo up
exec "$@"
"""
USE = """
import subprocess, sys, threading, time
import cpkit
other, deadline_s = sys.argv[1], float(sys.argv[2])
def cable(state):
    command = ["nsenter", "-t", other, "--net", "ip", "link", "set", "cable", state]
    subprocess.run(command, check=True)
def until(condition):
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)

lab = cpkit.connect("nodes", launch=False)
status = lab.status()
assert status.endpoint.startswith("tcp://10.77.0.1:"), status.endpoint
assert [worker.host for worker in status.workers] == ["machine0"] * 2 + ["machine1"] * 2
inside, across = lab.gather([64, 33], 2), lab.gather([64, 33], 4)
assert inside.verified and across.verified
print("inside:", inside.path, "| across:", across.path, across.path_reason)
trace = lab.trace([256], 4)
assert trace.spans_hosts and len(trace.spans) == 4

cable("down")
timer = threading.Timer(deadline_s / 3, cable, ["up"])
timer.start()
assert lab.gather([64, 33], 4).verified
timer.join()
print("mended")

cable("down")
start_s = time.monotonic()
try:
    lab.gather([64], 4)
except cpkit.NoAnswer as error:
    print("cut:", error)
assert time.monotonic() - start_s < 3 * deadline_s + 10
try:
    until(lambda: lab.status() is None)
except cpkit.WorkersDied as error:
    print("ended:", error)
cable("up")
"""

GATHER_UNTIL_ERROR = """
import time
import cpkit
lab = cpkit.connect("nodes", launch=False)
assert lab.gather([64, 33], 4).verified
print("gathering", flush=True)
try:
    while True:
        last_s = time.monotonic()
        lab.gather([64, 33], 4)
except cpkit.ControlError as error:
    print(f"after {time.monotonic() - last_s:.1f} s: {error}")
"""


class Machine:
    """One machine, until `close`."""

    def __init__(self, number: int, home: Path) -> None:
        self.number, self.home = number, home
        home.mkdir()
        namespaces = ["unshare", "--net", "--uts", "--mount"]
        self._holder = subprocess.Popen([*namespaces, "sh", "-ec", SETUP, str(number), *SLEEP])
        self.pid = self._holder.pid

    def run(self, *command: object) -> subprocess.Popen[str]:
        enter = ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", f"--wd={ROOT}"]
        return subprocess.Popen(
            [*enter, *map(str, command)],
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "JUPYTER_RUNTIME_DIR": str(self.home),
                "CPKIT_DEADLINE_S": str(DEADLINE_S),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def close(self) -> None:
        for process in processes_with("JUPYTER_RUNTIME_DIR", self.home):
            process.kill()
        self._holder.kill()
        self._holder.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    test = "ip link add cpkit-test type veth peer name cpkit-peer && ip link del cpkit-test"
    probe = ["unshare", "--net", "--uts", "--mount", "sh", "-c", test]
    try:
        refused = subprocess.run(probe, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if refused.returncode:
        pytest.skip(f"this machine refuses network namespaces: {refused.stderr.strip()}")
    made = [Machine(number, tmp_path / f"machine{number}") for number in range(2)]
    try:
        left_after(10, lambda: [m for m in made if _name(m) != f"machine{m.number}"])
        ends = [["cable", "netns", str(machine.pid)] for machine in made]
        command = ["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]]
        subprocess.run(command, check=True)
        for machine in made:
            address = f"10.77.0.{machine.number + 1}/24"
            up = f"ip addr add {address} dev cable && ip link set cable up"
            assert machine.run("sh", "-c", up).wait(10) == 0
        yield made
    finally:
        for machine in made:
            machine.close()


def _name(machine: Machine) -> str:
    return machine.run("hostname").communicate(timeout=10)[0].strip()


def start(machines: list[Machine]) -> list[str]:
    """Start two ranks on each machine; return what the commands print."""
    options = "--name nodes --nproc 2 --nnodes 2 --rdzv-endpoint 10.77.0.1:29500 --interface cable"
    starts = [
        machine.run("./launch_workers.sh", *options.split(), "--node-rank", machine.number)
        for machine in machines
    ]
    said = [start.communicate(timeout=LIMIT_S)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], said
    return said


def assert_nothing_left(machines: list[Machine]) -> None:
    for machine in machines:
        left = left_after(30, lambda: list(processes_with("JUPYTER_RUNTIME_DIR", machine.home)))  # noqa: B023 - called here
        assert not left
        assert machine.run("ls", "/dev/shm").communicate(timeout=10)[0] == ""


def test_two_machines_gather_outlast_a_short_cut_of_the_cable_and_end_after_a_long_one(
    machines: list[Machine],
) -> None:
    said = start(machines)
    assert "4 workers 'nodes' are ready" in said[0]
    assert "node 1 of 2 has started its 2 ranks" in said[1]

    shown, _ = (
        machines[1]
        .run("./launch_workers.sh", "status", "--name", "nodes.node1")
        .communicate(timeout=LIMIT_S)
    )
    assert "rank 0 serves on another node" in shown

    used = machines[0].run(sys.executable, "-c", USE, machines[1].pid, DEADLINE_S)
    lines, _ = used.communicate(timeout=LIMIT_S)
    assert used.returncode == 0, lines
    assert "inside: symmetric" in lines
    assert "across: fallback the group spans machines (ranks [0, 1, 2, 3])" in lines
    assert "mended" in lines
    for words in ("cut", "ended"):  # either rank of that machine may have been silent for longer
        assert re.search(rf"{words}: rank [23] \(process \d+ on machine1\)", lines), lines
    assert_nothing_left(machines)


def test_a_killed_machine_is_named_and_the_next_start_works(machines: list[Machine]) -> None:
    start(machines)
    used = machines[0].run(sys.executable, "-c", GATHER_UNTIL_ERROR)
    assert used.stdout
    assert used.stdout.readline() == "gathering\n"
    killed = list(processes_with("JUPYTER_RUNTIME_DIR", machines[1].home))
    for process in killed:
        process.kill()
    said, _ = used.communicate(timeout=LIMIT_S)
    after = re.match(r"after ([\d.]+) s: rank [23] \(process (\d+) on machine1\)", said)
    assert after, said
    assert int(after[2]) in {process.pid for process in killed}  # whichever was silent for longer
    assert float(after[1]) < 2 * DEADLINE_S + 5
    assert_nothing_left(machines)

    start(machines)
    used = machines[0].run(sys.executable, "-c", GATHER_UNTIL_ERROR)
    assert used.stdout
    assert used.stdout.readline() == "gathering\n"
    assert machines[0].run("./launch_workers.sh", "stop", "--name", "nodes").wait(60) == 0
    assert used.wait(60) == 0
    assert_nothing_left(machines)
