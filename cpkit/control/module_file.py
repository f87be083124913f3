"""Read a Python file that the workers will run, unless another user could have written it."""

from __future__ import annotations

import os
import shlex
import stat
from hashlib import blake2b
from pathlib import Path


def read_module(path: str) -> tuple[bytes, str]:
    """Return the content of a file and its digest. Raises ValueError if others could change it.

    The workers run the bytes that are returned here, and do not read the file again.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"--algorithms is {path!r}; it must be a Python file")
            _check_writers(path, found)
            _check_writers(str(Path(path).parent), Path(path).parent.stat())
            source = file.read()
    except OSError as error:
        raise ValueError(
            f"--algorithms is {path!r}, which cannot be read ({error.strerror}); name a Python "
            f"file of yours, for example examples/ring.py"
        ) from None
    return source, blake2b(source, digest_size=16).hexdigest()


def _check_writers(path: str, found: os.stat_result) -> None:
    """Check owner and mode; in a directory with the sticky bit, others cannot replace a file."""
    is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    is_foreign = found.st_uid not in (os.geteuid(), 0)
    if is_foreign or (found.st_mode & 0o022 and not is_sticky):
        remedy = f"chown {os.geteuid()}" if is_foreign else "chmod go-w"
        raise ValueError(
            f"{path} belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}, so "
            f"another user can decide what the workers run. It must belong to uid {os.geteuid()}, "
            f"and only its owner may write to it: look at it, then run {remedy} {shlex.quote(path)}"
        )
