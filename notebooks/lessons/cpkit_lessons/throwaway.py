"""Ranks to be wasted: start a few, let one make a mistake, and read what each of them saw.

A failure can leave a rank that waits for ever or is dead. So every case gets processes of its own,
a short deadline, and an end: whatever happens, they are gone when `throw_away` returns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

import cpkit
from cpkit.control.tied import tied
from cpkit_lessons.fault_report import RankReport

CASES = (
    "skips_the_rendezvous",
    "sizes_differ",
    "receive_only",
    "wrong_group",
    "divergent_free_lists",
    "shared_memory_is_full",
    "a_rank_dies",
)
SYMPTOMS = ("error at once", "error after the deadline", "slow but right", "silently wrong", "none")
DEADLINE_S = 1.5
_TIMEOUT_S = 35.0


@dataclass(frozen=True)
class PostMortem:
    """All ranks of one case. Shown as a table in a notebook."""

    case: str
    deadline_s: float
    ranks: tuple[RankReport, ...]

    @property
    def symptom(self) -> str:
        """One of SYMPTOMS, from what the ranks saw and not from what they were told to do."""
        errors = [rank for rank in self.ranks if rank.error]
        if errors:
            late = max(rank.waited_s for rank in errors) >= 0.9 * self.deadline_s
            return "error after the deadline" if late else "error at once"
        if any(rank.wrong for rank in self.ranks):
            return "silently wrong"
        slow = any("fallback" in rank.paths.values() for rank in self.ranks)
        return "slow but right" if slow else "none"

    def _repr_html_(self) -> str:
        left = ' style="text-align: left; white-space: nowrap"'
        head = "".join(f"<th{left}>{name}</th>" for name in ("", "ended", "waited (s)", "saw"))
        rows = "".join(
            f"<tr><th{left}>rank {r.rank}</th><td{left}>{escape(r.ended)}</td>"
            f"<td>{r.waited_s:.2f}</td>"
            f'<td style="text-align: left; white-space: normal">{escape(_saw(r))}</td></tr>'
            for r in self.ranks
        )
        title = escape(f"{self.case.replace('_', ' ')}: {self.symptom}")
        return f"<p><b>{title}</b></p><table><tr>{head}</tr>{rows}</table>"

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = f"{self.case.replace('_', ' ')}: {self.symptom}"
        lines = [f"rank {r.rank}  {r.ended}, {r.waited_s:.2f} s: {_saw(r)}" for r in self.ranks]
        return "\n".join([head, *lines])


def throw_away(
    case: str, *, size: int = 2, victim: int = 1, deadline_s: float = DEADLINE_S
) -> PostMortem:
    """Let `victim` make a mistake among `size` real ranks that wait `deadline_s` for each other.

    Raises ValueError for an unknown case; rank 0 can't be the victim, since it keeps the books.
    """
    if case not in CASES:
        raise ValueError(f"case is {case!r}; it must be one of {', '.join(CASES)}")
    if not 1 <= victim < size:
        raise ValueError(f"victim is {victim}; it must be one of ranks 1 to {size - 1}")
    with TemporaryDirectory(prefix="cpkit-lab-") as directory:
        folder = Path(directory)
        with _ranks(case, size, victim, folder, deadline_s) as processes:
            codes = _wait(processes, _TIMEOUT_S)
        reports = [_report(folder, rank, code) for rank, code in enumerate(codes)]
    return PostMortem(case, deadline_s, tuple(reports))


def _import_path() -> list[str]:
    """The directories that `cpkit` and this package were imported from."""
    return [str(Path(origin).parents[1]) for origin in (cpkit.__file__, __file__)]


@contextmanager
def _ranks(
    case: str, size: int, victim: int, folder: Path, deadline_s: float
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of one case, in sessions of their own; killed and reaped at the end."""
    command = [sys.executable, "-m", "cpkit_lessons.faults", case]
    command += [str(victim), str(deadline_s), str(folder), str(os.getpid())]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(_import_path()),
        "CPKIT_SYMM_PREALLOC_GB": "0.002",  # quick to make
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            with (folder / f"{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        tied(command),  # from this thread, which waits for them
                        env={**common, "RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Everybody's exit code; None for a rank that did not end in time."""
    give_up = time.monotonic() + timeout_s
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.01, give_up - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def _report(folder: Path, rank: int, code: int | None) -> RankReport:
    note = folder / f"{rank}.json"
    ended = -signal.SIGKILL if code is None else code
    if note.exists():
        report = msgspec.json.decode(note.read_bytes(), type=RankReport)
        return msgspec.structs.replace(report, exit_code=ended)
    lines = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
    late = "did not end in time and was killed by the lab; " if code is None else ""
    said = late + (lines[-1] if lines else "no last words")
    return RankReport(rank, said=said, exit_code=ended)


def _saw(rank: RankReport) -> str:
    if rank.error:
        return f"{rank.error}: {rank.said}"
    if rank.wrong:
        return f"wrong rows: {rank.wrong}" + (f" ({rank.reason})" if rank.reason else "")
    if rank.paths:
        paths = ", ".join(f"{name}: {path}" for name, path in rank.paths.items())
        return f"every row right; {paths}"
    return rank.said or "every row right"
