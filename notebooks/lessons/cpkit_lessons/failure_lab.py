"""Run ranks that make a mistake on purpose, and report what each of them observed.

A failed rank may hang or be dead. So each case has its own processes, a short deadline and a time
limit, and no process is left when `inject_fault` returns. They run `cpkit_lessons.faults`.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from cpkit.control.errors import name_the_limit
from cpkit.control.messages import Message
from cpkit_lessons.feedback import html_table
from cpkit_lessons.own_ranks import last_line, processes, wait

CASES = (
    "skips_the_rendezvous",
    "sizes_differ",
    "receive_only",
    "wrong_group",
    "divergent_free_lists",
    "shared_memory_is_full",
    "a_rank_dies",
)
SYMPTOMS = (
    "error at once",
    "error after the deadline",
    "fast path missed",
    "silently wrong",
    "none",
)
DEADLINE_S = 1.5
_TIMEOUT_S = 35.0


class RankReport(Message, frozen=True):
    """The observations of one rank, and the end of its process.

    `error`: the type of an exception, `message`: its text; `paths`: transport to path, `reason`:
    why; `wrong`: a description of the first wrong row; `exit_code`: added by the parent process.
    """

    rank: int
    error: str = ""
    message: str = ""
    waited_s: float = 0.0
    paths: dict[str, str] = msgspec.field(default_factory=dict)
    reason: str = ""
    wrong: str = ""
    exit_code: int = 0

    @property
    def ended(self) -> str:
        """The exit code, or the name of the signal that killed the process."""
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"

    @property
    def observed(self) -> str:
        """The error, the wrong row or the path, in one line."""
        if self.error:
            return f"{self.error}: {self.message}"
        if self.wrong:
            return f"wrong rows: {self.wrong}" + (f" ({self.reason})" if self.reason else "")
        if self.paths:
            paths = ", ".join(f"{name}: {path}" for name, path in self.paths.items())
            return f"every row right; {paths}. {self._why_fallback()}".strip()
        return self.message or "every row right"

    def _why_fallback(self) -> str:
        """Return the beginning of the reason of the last transport that falls back."""
        reasons = zip(self.paths.values(), self.reason.split("\n"), strict=False)
        fallbacks = [reason for path, reason in reasons if path == "fallback"]
        return fallbacks[-1].split(";")[0] if fallbacks else ""


@dataclass(frozen=True)
class PostMortem:
    """The reports of all ranks of one case. A notebook shows it as a table."""

    case: str
    deadline_s: float
    ranks: tuple[RankReport, ...]

    @property
    def symptom(self) -> str:
        """One of SYMPTOMS, derived from what the ranks observed."""
        errors = [rank for rank in self.ranks if rank.error]
        if errors:
            late = max(rank.waited_s for rank in errors) >= 0.9 * self.deadline_s
            return "error after the deadline" if late else "error at once"
        if any(rank.wrong for rank in self.ranks):
            return "silently wrong"
        missed = any("fallback" in rank.paths.values() for rank in self.ranks)
        return "fast path missed" if missed else "none"

    @property
    def title(self) -> str:
        """The case and its symptom."""
        return f"{self.case.replace('_', ' ')}: {self.symptom}"

    def _repr_html_(self) -> str:
        rows = [(f"rank {r.rank}", r.ended, f"{r.waited_s:.2f}", r.observed) for r in self.ranks]
        table = html_table(["", "ended", "time (s)", "observed"], rows)
        return f"<p><b>{escape(self.title)}</b></p>{table}"

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"rank {r.rank}  {r.ended}, {r.waited_s:.2f} s: {r.observed}" for r in self.ranks]
        return "\n".join([self.title, *lines])


@name_the_limit()
def inject_fault(
    case: str, *, size: int = 2, victim: int = 1, deadline_s: float = DEADLINE_S
) -> PostMortem:
    """Run `size` ranks with a deadline of `deadline_s`, one of which makes the mistake `case`.

    Raises ValueError for an unknown case or victim.
    """
    if case not in CASES:
        raise ValueError(f"case is {case!r}; it must be one of {', '.join(CASES)}")
    if not 0 <= victim < size:
        raise ValueError(f"victim is {victim}; it must be one of ranks 0 to {size - 1}")
    with TemporaryDirectory(prefix="cpkit-lab-") as directory:
        folder = Path(directory)
        command = ["cpkit_lessons.faults", case, str(victim), str(deadline_s), str(folder)]
        print(f"starting {size} ranks …")  # noqa: T201 - it takes seconds
        with processes(command, size, folder) as started:
            end_s = time.monotonic() + _TIMEOUT_S
            if _all_begin(started, folder, end_s):
                print(f"they run; each waits at most {deadline_s:g} s for its peers …")  # noqa: T201
            codes = wait(started, end_s - time.monotonic())
        reports = [_report(folder, rank, code) for rank, code in enumerate(codes)]
    return PostMortem(case, deadline_s, tuple(reports))


def ready_file(folder: Path, rank: int) -> Path:
    """Return the file that a rank makes when it begins its case."""
    return folder / f"{rank}.ready"


def _all_begin(started: Sequence[subprocess.Popen[bytes]], folder: Path, end_s: float) -> bool:
    """Wait until every rank has begun its case; return False if one ends before, or at `end_s`."""
    while time.monotonic() < end_s:
        over = [process.poll() is not None for process in started]  # before the next line
        begun = [ready_file(folder, rank).exists() for rank in range(len(started))]
        if all(begun):
            return True
        if any(is_over and not has_begun for is_over, has_begun in zip(over, begun, strict=True)):
            return False
        time.sleep(0.02)
    return False


def _report(folder: Path, rank: int, code: int | None) -> RankReport:
    """Read a rank's report; without one, use the last line of its log."""
    path = folder / f"{rank}.json"
    exit_code = -signal.SIGKILL if code is None else code
    if path.exists():
        report = msgspec.json.decode(path.read_bytes(), type=RankReport)
        return msgspec.structs.replace(report, exit_code=exit_code)
    late = "did not end in time and was killed by the failure lab; " if code is None else ""
    return RankReport(rank, message=late + last_line(folder, rank), exit_code=exit_code)
