"""Run NVIDIA's MPS daemon as an ordinary process, with its files in the agent's directory.

Without MPS, the GPU time-slices the ranks that share it, a few milliseconds per slice. As clients
of one MPS daemon, their kernels run concurrently, and a barrier between them takes microseconds.
The GPU's settings do not change. A daemon that the user already runs is used and not stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpkit.os_errors import describe

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_CONTROL_TIMEOUT_S = 5.0  # shorter than the timeout for stopping an agent


def is_installed() -> bool:
    """Return True when the daemon's program is installed."""
    return shutil.which(_CONTROL) is not None


def is_configured() -> bool:
    """Return True when the environment already contains the directory of a daemon."""
    return _PIPES in os.environ


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[str]:
    """Run a daemon for the processes started inside the context; yield its status as text.

    If the program is missing or fails, the ranks still work, but are time-sliced.
    """
    if is_configured():
        yield f"MPS: using the daemon at {os.environ[_PIPES]}"
        return
    if not is_installed():
        yield f"MPS: {_CONTROL} is not installed; {_COST}"
        return
    variables = {_PIPES: str(directory / "mps"), _LOGS: str(directory / "mps-log")}
    environment = {**os.environ, **variables}
    try:
        failed = _make_directories(variables.values()) or _control(["-d"], environment)
        if failed:
            yield f"MPS: {failed}; {_COST}"
            return
        os.environ.update(variables)
        yield f"MPS: own daemon at {variables[_PIPES]}"
    finally:  # also after an interrupted start, which may leave a running daemon
        for name in variables:
            os.environ.pop(name, None)
        _control([], environment, "quit\n")


def quit_daemon(directory: Path) -> None:
    """Stop the daemon of a directory whose agent was killed; do nothing if there is none."""
    pipes = directory / "mps"
    if pipes.is_dir() and is_installed():
        _control([], {**os.environ, _PIPES: str(pipes)}, "quit\n")


_COST = "ranks that share a GPU are time-sliced, so a barrier between them takes milliseconds"


def _make_directories(paths: Iterable[str]) -> str:
    """Make the daemon's directories; return "" on success, otherwise the error."""
    try:
        for path in paths:
            Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return describe(error)
    return ""


def _control(options: list[str], environment: dict[str, str], commands: str = "") -> str:
    """Run the control program; return "" on success, otherwise the error."""
    try:
        done = subprocess.run(
            [_CONTROL, *options],
            input=commands,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_CONTROL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{_CONTROL} failed: {describe(error)}"
    return (
        "" if done.returncode == 0 else f"{_CONTROL} failed: {done.stdout or done.stderr}".strip()
    )
