"""The machine and the versions with which figures were measured."""

from __future__ import annotations

import datetime as dt
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import openmpi
from cpkit_lessons.machine import commit, processor


def environment(command: str, device: str = "cpu") -> dict[str, Any]:
    """Return the machine, the versions, the commit and the date."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "time_utc": dt.datetime.now(tz=dt.UTC).time().isoformat(timespec="seconds"),
        "command": command,
        "commit": commit() or "not a git checkout",
        "device": device,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "open_mpi": openmpi.available() or openmpi.version(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def cache_bytes() -> int:
    """Return the size of the last-level cache, or 0 if the system does not report it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [path.read_text().strip() for path in sizes]
    return max(
        (int(size.removesuffix("K")) << 10 for size in found if size.endswith("K")), default=0
    )
