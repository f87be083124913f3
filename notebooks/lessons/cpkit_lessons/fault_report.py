"""What one throw-away rank saw: `faults` writes it, `throwaway` reads it."""

from __future__ import annotations

import signal

import msgspec

from cpkit.control.messages import Message


class RankReport(Message, frozen=True):
    """One rank's end and what it wrote down before.

    `paths`: transport to path; `wrong`: the first wrong row, in words; `exit_code`: filled in by
    who waited for the rank.
    """

    rank: int
    error: str = ""
    said: str = ""
    waited_s: float = 0.0
    paths: dict[str, str] = msgspec.field(default_factory=dict)
    reason: str = ""
    wrong: str = ""
    exit_code: int = 0

    @property
    def ended(self) -> str:
        """How the process ended, in words."""
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"
