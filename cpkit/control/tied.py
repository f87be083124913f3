"""Run a command that ends when the process that started it ends, at whatever moment that is.

    python -m cpkit.control.tied PARENT_PID SIGNAL COMMAND [ARGUMENT ...]

The kernel sends SIGNAL (PR_SET_PDEATHSIG), and keeps doing so after `exec`, so COMMAND can be any
program and takes no part in it. A parent that ended before the call is noticed by its pid: this
process then has another parent. Imports nothing heavy, because until the call the process is
untied.

PR_SET_PDEATHSIG fires when the *thread* that started the process ends. Start tied processes from a
thread that waits for them, or from the main thread. Outside of Linux only the pids are compared.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
PARENT_GONE_CODE = 3


def tied(command: list[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """The command line that runs `command` tied to this process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), str(int(number)), *command]


def tie(parent_pid: int, number: int) -> None:
    """Ask the kernel for signal `number` at the end of the parent. Exits if it ended before."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit(PARENT_GONE_CODE)


def main(arguments: list[str]) -> None:
    """Tie this process, then become the command."""
    parent_pid, number, *command = arguments
    tie(int(parent_pid), int(number))
    os.execvp(command[0], command)  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main(sys.argv[1:])
