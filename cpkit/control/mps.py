"""NVIDIA's MPS daemon, as an ordinary process with its files in a directory of ours.

Ranks that share a GPU take turns on it, a few milliseconds each, unless they are clients of one MPS
daemon: then their kernels run side by side, and a barrier between them takes microseconds. Nothing
of the GPU's settings is touched, and a daemon that the user runs already is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_QUIT_S = 5.0  # less than an agent is given to end


def is_installed() -> bool:
    """Whether this machine has the daemon's program."""
    return shutil.which(_CONTROL) is not None


def is_configured() -> bool:
    """Whether this process is to be a client of a daemon already."""
    return _PIPES in os.environ


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[str]:
    """Run a daemon for the processes that are started inside; yields what came of it, in words.

    Without the program, or when it fails, everything still works: ranks then take turns.
    """
    if is_configured():
        yield f"MPS: using the daemon at {os.environ[_PIPES]}"
        return
    if not is_installed():
        yield f"MPS: {_CONTROL} is not installed; {_COST}"
        return
    places = {_PIPES: str(directory / "mps"), _LOGS: str(directory / "mps-log")}
    for place in places.values():
        Path(place).mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = {**os.environ, **places}
    try:
        failed = _control(["-d"], environment)
        if failed:
            yield f"MPS: {failed}; {_COST}"
            return
        os.environ.update(places)
        yield f"MPS: own daemon at {places[_PIPES]}"
    finally:  # also when its start was interrupted: it may run all the same
        for name in places:
            os.environ.pop(name, None)
        _control([], environment, "quit\n")


def quit_daemon(directory: Path) -> None:
    """End the daemon of a directory whose agent could not do it any more; nothing without one."""
    pipes = directory / "mps"
    if pipes.is_dir() and is_installed():
        _control([], {**os.environ, _PIPES: str(pipes)}, "quit\n")


_COST = "ranks on one GPU take turns, and a barrier between them costs milliseconds"


def _control(options: list[str], environment: dict[str, str], orders: str = "") -> str:
    """Run the control program; empty when it went well, else why not."""
    try:
        done = subprocess.run(
            [_CONTROL, *options],
            input=orders,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_QUIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{_CONTROL} failed: {error}"
    return (
        "" if done.returncode == 0 else f"{_CONTROL} failed: {done.stdout or done.stderr}".strip()
    )
