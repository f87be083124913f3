"""Run rank programs under torchrun with a deadline, and read the result of each check."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from cpkit.control.tied import tied
from tests.helpers import ROOT

LIMIT_S = 300.0  # only a launch that hangs takes this long
# The rank programs by number of ranks. One launch runs all of them, because starting torch takes
# longer than most checks. Those of 4 ranks include gathers in groups of 2.
MODULES = {
    2: ("caches", "symmetric", "signals", "waits", "benchmark", "threads", "own_algorithms"),
    3: ("gathers", "plans", "crossed", "fuzz"),
    4: ("groups", "odd_tensors"),
}
# Those that break the code to see a check fail, and the same programs with other numbers of ranks.
SLOW_MODULES = {
    2: ("plans", "crossed", "fuzz"),
    3: ("caches", "signals", "mutants", "fuzz_mutants"),
    4: ("gathers", "symmetric", "waits", "fuzz"),  # gathers in groups of 2 among them
}


def torchrun(
    *command: str, nproc: int, timeout_s: float = LIMIT_S, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun; past the time limit, fail with the stacks of all ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with (
        TemporaryDirectory() as logs,  # otherwise torchrun leaves a directory behind
        subprocess.Popen(
            tied(
                [*launch, f"--nproc-per-node={nproc}", f"--log-dir={logs}", *command],
                signal.SIGTERM,  # on which torchrun ends its ranks
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **(env or {})},
        ) as agent,
    ):
        try:
            output, _ = agent.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"torchrun took more than {timeout_s} s:\n{_end_with_stacks(agent)}")
        finally:
            if agent.poll() is None:  # the test was interrupted
                agent.terminate()
    return subprocess.CompletedProcess(agent.args, agent.returncode, output)


def _end_with_stacks(agent: subprocess.Popen[str]) -> str:
    """End all ranks and their agent; return their output, with the stack of every thread."""
    for rank in psutil.Process(agent.pid).children():
        rank.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER prints the stacks
    try:
        return agent.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        agent.terminate()
        return agent.communicate()[0]


@cache
def results_of(
    modules: str, nproc: int, env: tuple[tuple[str, str], ...] = (), timeout_s: float = LIMIT_S
) -> list[dict[str, str]] | str:
    """Return the error of each check (or ""), per rank; or a text if the launch failed. Cached."""
    with TemporaryDirectory() as directory:
        command = ("-m", "tests.ranks.runner", modules, directory)
        try:
            done = torchrun(*command, nproc=nproc, timeout_s=timeout_s, env=dict(env))
        except pytest.fail.Exception as failure:
            return str(failure)
        files = [Path(directory) / f"{rank}.json" for rank in range(nproc)]
        if not all(file.exists() for file in files):
            return f"a rank of {modules} did not finish:\n{done.stdout}"
        return [json.loads(file.read_text()) for file in files]


def assert_passed(
    modules: str,
    nproc: int,
    check: str,
    env: tuple[tuple[str, str], ...] = (),
    timeout_s: float = LIMIT_S,
) -> None:
    """Fail with the traceback of each rank on which the check failed."""
    results = results_of(modules, nproc, env, timeout_s)
    if isinstance(results, str):
        pytest.fail(results)
    errors = [by_check[check] for by_check in results]
    assert not any(errors), "\n".join(
        f"rank {rank}: {text}" for rank, text in enumerate(errors) if text
    )


def assert_passed_together(modules: Sequence[str], nproc: int, check: str) -> None:
    """As `assert_passed`, in one launch of these programs."""
    assert_passed(",".join(f"tests.ranks.{name}" for name in modules), nproc, check)
