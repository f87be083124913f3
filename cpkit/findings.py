"""One line of the doctor's report."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """What was looked at, what was found, and what to do if that is too little."""

    subject: str
    found: str
    advice: str = ""
