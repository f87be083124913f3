"""Measure the size of the repository, and how much code one gather enters.

    python -m tools.measure_house

Prints lines and modules per folder, the number of `CPKIT_*` variables, and for one warm
`all_gather_kv` of rank 0 (one tensor, two sequences, cp_size 2, CPU) the files and distinct
functions of cpkit that it enters. A comprehension counts as part of its function.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from cpkit import settings
from cpkit.processes import run_command

ROOT = Path(__file__).parents[1]
GATHER = ("layout", "provenance", "group", "validate", "gather", "plan", "symm", "reference")
PARTS = {
    "cpkit": ["cpkit"],
    "  of these the gather": [
        *(f"cpkit/{name}.py" for name in GATHER),
        *(f"cpkit/{name}" for name in ("sync", "memory", "kernels")),
    ],
    "lessons": ["notebooks/lessons"],
    "tools": ["tools"],
    "cpkit, lessons and tools": ["cpkit", "notebooks/lessons", "tools"],
    "tests": ["tests"],
    "benchmarks": ["benchmarks"],
}
ALGORITHMS = ("padded_symm", "direct")
_LIMIT_S = 120


def main(arguments: list[str] | None = None) -> int:
    """Print both tables; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the size of cpkit and of one gather.")
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_output:
        _measure_on_rank(options.rank_output)
        return 0
    print(f"{'part':28} {'modules':>8} {'lines':>8}")
    for part, paths in PARTS.items():
        modules, lines = size_of(paths)
        print(f"{part:28} {modules:8,} {lines:8,}")
    by_users, by_agents = variables()
    print(f"\nCPKIT_* variables: {by_users} that users set, {by_agents} that agents pass to ranks")
    print(f"\n{'one warm all_gather_kv':28} {'files':>8} {'functions':>10} {'changes of file':>16}")
    try:
        gathers = entered_by_a_gather()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"the gather was not measured: {error}", file=sys.stderr)
        return 1
    for algorithm, entered in gathers.items():
        print(f"{algorithm:28} {entered[0]:8} {entered[1]:10} {entered[2]:16}")
    return 0


def size_of(paths: list[str]) -> tuple[int, int]:
    """Return the number of Python modules in these files and folders, and of their lines."""
    files = [
        file
        for path in map(ROOT.joinpath, paths)
        for file in (path.rglob("*.py") if path.is_dir() else [path])
    ]
    return len(files), sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def variables() -> tuple[int, int]:
    """Return the number of `CPKIT_*` variables that users set, and that agents pass to ranks."""
    passed_on = (settings.LAUNCH, settings.AGENT, settings.DEVICE, settings.GPU_NOTE)
    return len(settings.SETTINGS), len(passed_on)


def entered_by_a_gather() -> dict[str, tuple[int, int, int]]:
    """Return files, distinct functions and changes of file by algorithm. Starts two ranks.

    Raises RuntimeError with the end of their output if the ranks fail, and TimeoutExpired after
    120 s.
    """
    with TemporaryDirectory() as directory:
        output = Path(directory) / "entered.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", f"--log-dir={directory}", "-m", "tools.measure_house"]
        command += ["--rank-output", str(output)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the ranks failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
        found: dict[str, list[int]] = json.loads(output.read_text())
    return {algorithm: (each[0], each[1], each[2]) for algorithm, each in found.items()}


def _measure_on_rank(output: Path) -> None:
    import torch
    import torch.distributed as dist

    from cpkit.gather import all_gather_kv
    from cpkit.group import init_context_parallel
    from cpkit.layout import prepare_context_parallel_metadata

    dist.init_process_group("gloo")
    group = init_context_parallel(2)
    metadata = prepare_context_parallel_metadata([400, 333], 2)
    rows = torch.ones(metadata.per_rank_actual_token[group.rank], 8, 128)
    found = {}
    for algorithm in ALGORITHMS:

        def gather(algorithm: str = algorithm) -> None:
            all_gather_kv([rows], metadata, group, algorithm=algorithm)

        for _ in range(5):
            gather()
        group.barrier()
        found[algorithm] = _entered(gather)
    if group.rank == 0:
        output.write_text(json.dumps(found))
    group.barrier()
    dist.destroy_process_group()


def _entered(call: Callable[[], None]) -> tuple[int, int, int]:
    package = str(ROOT / "cpkit") + os.sep
    trail: list[tuple[str, str]] = []

    def record(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        is_part = code.co_name.startswith("<") and code.co_name != "<lambda>"
        if event == "call" and code.co_filename.startswith(package) and not is_part:
            trail.append((code.co_filename, code.co_qualname))

    sys.setprofile(record)
    call()
    sys.setprofile(None)
    files = [file for file, _ in trail]
    changes = sum(before != after for before, after in pairwise(files))
    return len(set(files)), len(set(trail)), changes


if __name__ == "__main__":
    run_command(main)
