"""Return the processor and the commit, for records and reports."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


def processor() -> str:
    """Return the name of the processor as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


_OWN_PATH = "notebooks/lessons/cpkit_lessons/machine.py"  # of this file in cpkit's repository


def commit() -> str:
    """Return the commit of cpkit's checkout, marked if it has changes.

    Empty without git, and for a cpkit that is installed, also inside another project's checkout.
    """
    is_own = _git("ls-files", "--full-name", Path(__file__).name) == _OWN_PATH
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if is_own else ""


def _git(*arguments: str) -> str:
    """Return the output of git in the folder of this file; empty if it fails."""
    git = shutil.which("git")
    if git is None:
        return ""
    return subprocess.run(
        [git, *arguments],
        cwd=Path(__file__).resolve().parent,
        # A hook of another repository sets GIT_DIR.
        env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
