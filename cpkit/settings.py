"""The environment variables that change what cpkit does, read and checked in one place.

An invalid value raises ValueError, which says what is allowed. Variables are read at each use, not
at import, so that a test or a script can change them.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cpkit.os_errors import describe, lacks_descriptors

_LONGEST_DEADLINE_S = 86400
_LARGEST_BYTES = 1 << 60


@dataclass(frozen=True)
class Setting:
    """One variable that users may set."""

    name: str
    meaning: str
    default: str


SETTINGS = (
    Setting(
        "CPKIT_NAME",
        "which set of workers `cpkit.connect()` and the notebooks use",
        "`default`",
    ),
    Setting("CPKIT_DEADLINE_S", "how many seconds a rank waits for its peers", "30"),
    Setting(
        "CPKIT_SYMM_PREALLOC_GB",
        "size of the symmetric pool's arena, in GiB",
        "4 on CUDA, less where ranks share a GPU; on the CPU a fraction of the free shared memory",
    ),
    Setting("CPKIT_SHM_DIR", "directory of shared-memory segments, preferably tmpfs", "`/dev/shm`"),
    Setting(
        "CPKIT_MEMORY_LIMIT_BYTES",
        "memory that requests to the workers may use, all ranks together",
        "half of what is available",
    ),
    Setting("CPKIT_NCCL", "`1`: use NCCL even where ranks share a GPU", "off"),
    Setting(
        "CPKIT_HOST_ID",
        "identity of this machine, so that one machine can simulate several in a test",
        "from the system",
    ),
    Setting("CPKIT_STATIC", "`1`: figures also as PNG, for pages without JavaScript", "off"),
    Setting(
        "CPKIT_ANSWER_KEY",
        "`1`: fill in predictions that a learner left open, so that a notebook runs to its end",
        "off",
    ),
)
# Set by an agent for its ranks, not by users.
LAUNCH, AGENT, DEVICE, GPU_NOTE = "CPKIT_LAUNCH", "CPKIT_AGENT", "CPKIT_DEVICE", "CPKIT_GPU_NOTE"


def problem_of(setting: Setting) -> str:
    """Return why the value of a variable is invalid; empty when it is valid."""
    checks = {
        "CPKIT_DEADLINE_S": deadline_s,
        "CPKIT_SYMM_PREALLOC_GB": symm_prealloc_bytes,
        "CPKIT_SHM_DIR": check_shm_dir,
        "CPKIT_MEMORY_LIMIT_BYTES": memory_limit_bytes,
        "CPKIT_NCCL": nccl_is_forced,
        "CPKIT_STATIC": figures_are_static,
    }
    try:
        checks.get(setting.name, str)()
    except ValueError as error:
        return str(error)
    return ""


def check_all() -> None:
    """Check all variables. Raises ValueError for the first one whose value is invalid."""
    for setting in SETTINGS:
        problem = problem_of(setting)
        if problem:
            raise ValueError(problem)


def chosen(setting: Setting) -> str | None:
    """Return the current value of a variable; None when it is not set."""
    return os.environ.get(setting.name)


def workers_name() -> str:
    """Return the name of the set of workers that "default" refers to."""
    return os.environ.get("CPKIT_NAME") or "default"


def deadline_s() -> float:
    """Return the deadline of every wait for other ranks, in seconds.

    Raises ValueError for a value that is not between 0 and one day, because every wait must end.
    """
    return _deadline_s(os.environ.get("CPKIT_DEADLINE_S") or "30")


@lru_cache(maxsize=4)  # it is needed in every gather
def _deadline_s(chosen: str) -> float:
    with suppress(ValueError):
        if 0 < float(chosen) <= _LONGEST_DEADLINE_S:
            return float(chosen)
    raise ValueError(
        f"CPKIT_DEADLINE_S is {chosen!r}; it must be seconds, above 0 and up to "
        f"{_LONGEST_DEADLINE_S}"
    )


def symm_prealloc_bytes() -> int | None:
    """Return the bytes of a pool's arena; None when the backend chooses. Raises ValueError."""
    chosen_gb = os.environ.get("CPKIT_SYMM_PREALLOC_GB")
    if not chosen_gb:
        return None
    try:
        nbytes = int(float(chosen_gb) * (1 << 30))
    except (ValueError, OverflowError):
        nbytes = 0
    if not 1 <= nbytes <= _LARGEST_BYTES:
        raise ValueError(
            f"CPKIT_SYMM_PREALLOC_GB is {chosen_gb!r}; it must be a number of GiB, such as 4 or 0.5"
        )
    return nbytes


def shm_dir() -> Path:
    """Return the directory of segments: the chosen one, otherwise /dev/shm or the system's temp."""
    chosen = os.environ.get("CPKIT_SHM_DIR")
    if chosen:
        return Path(chosen)
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def check_shm_dir() -> None:
    """Check that segments can be made in `shm_dir()`. Raises ValueError."""
    try:
        tempfile.TemporaryFile(dir=shm_dir()).close()
    except OSError as error:
        if lacks_descriptors(error):
            raise ValueError(describe(error)) from None
        chosen = os.environ.get("CPKIT_SHM_DIR") or "/dev/shm"
        raise ValueError(
            f"CPKIT_SHM_DIR is {chosen!r}, where no file can be created ({error.strerror}); it "
            "must be a writable directory, preferably a tmpfs"
        ) from None


def memory_limit_bytes() -> int | None:
    """Return the memory that requests may use; None for the default. Raises ValueError."""
    chosen = os.environ.get("CPKIT_MEMORY_LIMIT_BYTES")
    if not chosen:
        return None
    if not chosen.isdecimal() or not 1 <= int(chosen) <= _LARGEST_BYTES:
        raise ValueError(
            f"CPKIT_MEMORY_LIMIT_BYTES is {chosen!r}; it must be a whole number of bytes, 1 or more"
        )
    return int(chosen)


def nccl_is_forced() -> bool:
    """Return True when NCCL is used even where ranks share a GPU."""
    return _is_on("CPKIT_NCCL")


def host_id() -> str | None:
    """Return the identity that was chosen for this machine; None when none was."""
    return os.environ.get("CPKIT_HOST_ID") or None


def figures_are_static() -> bool:
    """Return True when figures are also shown as PNG."""
    return _is_on("CPKIT_STATIC")


def worker_device() -> str:
    """Return the device of a worker's rank, "cpu" or "cuda", as its agent chose."""
    return passed_on(DEVICE) or "cpu"


def passed_on(name: str) -> str:
    """Return what an agent passed to this process in LAUNCH, AGENT, DEVICE or GPU_NOTE."""
    return os.environ.get(name, "")


def pass_on(name: str, value: str) -> None:
    """Pass a value to the processes that this one starts."""
    os.environ[name] = value


def _is_on(name: str) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} is {value!r}; it must be 1 (on), or 0 or unset (off)")
    return value == "1"
