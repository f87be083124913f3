"""The chaos command with a few faults, and the load command for half a minute."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.processes import in_small_tmpfs

pytestmark = pytest.mark.workers


@pytest.mark.slow("takes minutes; test_worker_faults.py and test_worker_hangs.py have the faults")
@pytest.mark.timeout(900)
def test_every_kind_of_fault_is_survived() -> None:
    in_small_tmpfs(ROOT, 1)  # skips where this machine refuses it
    command = [sys.executable, "-m", "benchmarks.chaos", "--faults", "21", "--seed", "17"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 of 21 faults survived; left over []" in done.stdout


@pytest.mark.slow("takes a minute; test_sharing.py has clients that share the workers")
def test_twenty_clients_are_all_served(runtime_dir: object) -> None:
    command = [sys.executable, "-m", "benchmarks.load", "--minutes", "0.3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow("starts workers; test_messages.py and test_socket.py have such messages")
def test_damaged_messages_are_rejected_by_the_decoder_and_by_workers(runtime_dir: object) -> None:
    command = [sys.executable, "-m", "benchmarks.message_fuzz", "--decode=20000", "--send=5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
