"""Describe errors of the operating system, with the limit that was reached."""

from __future__ import annotations

import contextlib
import errno
import os
import resource

# ZeroMQ ends the process when it finds no descriptor for a thread or for a client that connects.
SPARE_DESCRIPTORS = 16
_TOO_MANY_FILES = os.strerror(errno.EMFILE)


def lacks_descriptors(error: BaseException) -> bool:
    """Return True when an error means that no file descriptor was free.

    OSError and ZMQError have a number; torch raises RuntimeError with only the system's text.
    """
    number = getattr(error, "errno", None)
    return number in (errno.EMFILE, errno.ENFILE) or _TOO_MANY_FILES in str(error)


def require_descriptors(count: int) -> None:
    """Raise OSError unless this many file descriptors are free."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def raise_descriptor_limit() -> None:
    """Raise the limit of open files as far as a user may, for this process and its children."""
    _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))


def describe(error: BaseException) -> str:
    """Return the text of an error. For a lack of descriptors, name the limit and the remedy."""
    if not lacks_descriptors(error):
        return str(error)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    whole_machine = os.strerror(errno.ENFILE)
    if getattr(error, "errno", None) == errno.ENFILE or whole_machine in str(error):
        return "too many open files on this machine: raise its limit (sysctl fs.file-max)"
    return (
        f"too many open files: the limit of this process is {limit}; set a higher one before it "
        f"starts, for example with `ulimit -n {max(4096, 2 * limit)}`"
    )
