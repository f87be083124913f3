"""Start ranks for a single cell, separate from the workers, and end them.

    in_ranks(program, 2)   run `program(group)` on two new ranks, and return what each rank returned

The ranks run `cpkit_lessons.one_rank`, or the command that the failure lab gives. They are on the
CPU, and no process is left afterwards.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from cpkit.control.errors import name_the_limit
from cpkit.control.tied import tied

LIMIT_S = 60.0  # of one cell, which takes seconds


@name_the_limit()
def in_ranks(program: Callable[..., Any], size: int) -> list[Any]:
    """Run `program(group)` on `size` new ranks, and return what each rank returned, by rank.

    Only the text of the function reaches the ranks, so it imports what it needs. It returns
    numbers, strings, lists and dicts. Raises RuntimeError with the last line of the first rank that
    failed.
    """
    print(f"Starting {size} ranks for this cell …")  # noqa: T201 - it takes seconds
    with TemporaryDirectory(prefix="cpkit-ranks-") as directory:
        folder = Path(directory)
        source = textwrap.dedent(inspect.getsource(program))
        (folder / "program.py").write_text(source, encoding="utf-8")
        command = ["cpkit_lessons.one_rank", program.__name__, str(folder)]
        with processes(command, size, folder) as started:
            failed = _first_failure(started)
        if failed is not None:
            raise RuntimeError(f"rank {failed} failed: {last_line(folder, failed)}")
        return [msgspec.json.decode((folder / f"{rank}.json").read_bytes()) for rank in range(size)]


@contextmanager
def processes(
    command: Sequence[str], size: int, folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start `python -m command` per rank, each in its own session; kill and reap them at the end.

    Rank r writes its output to `{r}.log` in `folder`.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "CPKIT_DEADLINE_S"}
    common = {
        **inherited,  # without the deadline of the workers: these ranks have their own
        # The ranks import the same two packages as this process, wherever these were found.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CPKIT_SYMM_PREALLOC_GB": "0.002",  # starts quickly
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            with (folder / f"{rank}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        tied([sys.executable, "-m", *command]),  # tied to this thread, which waits
                        env={**common, "RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _first_failure(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Return the rank that failed first, or that did not end in LIMIT_S; None if all succeeded.

    The peers of a failed rank may wait for it, so they are not waited for.
    """
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        codes = [process.poll() for process in started]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            return min(failed, default=None)
        time.sleep(0.02)
    return codes.index(None)


def wait(started: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Return the exit codes; None for a rank that did not end in time."""
    deadline = time.monotonic() + timeout_s
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.01, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def last_line(folder: Path, rank: int) -> str:
    """Return the last line of a rank's log."""
    lines = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "its log is empty"
