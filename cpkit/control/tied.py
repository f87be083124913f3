"""Run a command that ends when the process that started it ends.

    python -m cpkit.control.tied PARENT_PID SIGNAL COMMAND [ARGUMENT ...]

The kernel sends SIGNAL (PR_SET_PDEATHSIG). The setting survives `exec`, so COMMAND can be any
program. If the parent ended before the call, this process has another parent pid, and exits. The
module imports only the standard library, so that the call is early.

The kernel sends the signal when the *thread* that started the process ends. Start tied processes
from a thread that waits for them, or from the main thread. Outside Linux, no signal is sent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
PARENT_GONE_CODE = 3


def tied(command: list[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """Return the command line that runs `command` until this process ends."""
    return [sys.executable, "-m", __name__, str(os.getpid()), str(int(number)), *command]


def signal_when_parent_ends(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends. Nothing outside Linux."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then replace it with the command."""
    parent_pid, number, *command = arguments
    signal_when_parent_ends(signal.Signals(int(number)))
    if os.getppid() != int(parent_pid):
        sys.exit(PARENT_GONE_CODE)
    os.execvp(command[0], command)  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main(sys.argv[1:])
