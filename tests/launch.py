"""Starts rank code under torchrun, with a deadline, and reads back what each rank found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[1]


def torchrun(
    *command: str, nproc: int, timeout_s: float = 90, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun; past the time limit its agent is told to end all ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with (
        TemporaryDirectory() as logs,  # else torchrun leaves a directory of its own behind
        subprocess.Popen(
            [*launch, f"--nproc-per-node={nproc}", f"--log-dir={logs}", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        ) as agent,
    ):
        try:
            output, _ = agent.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            agent.terminate()
            output, _ = agent.communicate(timeout=60)
            pytest.fail(f"torchrun took more than {timeout_s} s:\n{output}")
    return subprocess.CompletedProcess(agent.args, agent.returncode, output)


@cache
def results_of(
    module: str, nproc: int, env: tuple[tuple[str, str], ...] = (), timeout_s: float = 90
) -> list[dict[str, str]]:
    """What every check of a module said, by rank. One launch serves all its tests."""
    with TemporaryDirectory() as directory:
        command = ("-m", "tests.ranks.runner", module, directory)
        done = torchrun(*command, nproc=nproc, timeout_s=timeout_s, env=dict(env))
        files = [Path(directory) / f"{rank}.json" for rank in range(nproc)]
        if not all(file.exists() for file in files):
            pytest.fail(f"a rank of {module} did not finish:\n{done.stdout}")
        return [json.loads(file.read_text()) for file in files]


def assert_passed(
    module: str,
    nproc: int,
    check: str,
    env: tuple[tuple[str, str], ...] = (),
    timeout_s: float = 90,
) -> None:
    """Fail with the traceback of each rank on which the check failed."""
    said = [results[check] for results in results_of(module, nproc, env, timeout_s)]
    assert not any(said), "\n".join(
        f"rank {rank}: {text}" for rank, text in enumerate(said) if text
    )
