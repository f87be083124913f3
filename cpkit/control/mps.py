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
from itertools import takewhile
from pathlib import Path

from cpkit.os_errors import describe

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
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
    visible = os.environ.get(_VISIBLE)
    environment = {**os.environ, **variables}
    try:
        failed = _make_directories(variables.values()) or _control(["-d"], environment)
        if failed:
            yield f"MPS: {failed}; {_COST}"
            return
        os.environ.update(variables)
        if visible is not None:
            os.environ[_VISIBLE] = visible_to_clients(visible)
        yield f"MPS: own daemon at {variables[_PIPES]}"
    finally:  # also after an interrupted start, which may leave a running daemon
        for name in variables:
            os.environ.pop(name, None)
        if visible is not None:
            os.environ[_VISIBLE] = visible
        _control([], environment, "quit\n")


def visible_to_clients(visible: str) -> str:
    """Return CUDA_VISIBLE_DEVICES for the clients of a daemon that was started with `visible`.

    The daemon numbers the GPUs that it sees from 0, and its clients count in these numbers; a UUID
    means the same GPU to both (NVIDIA's MPS guide, "CUDA_VISIBLE_DEVICES").

    >>> visible_to_clients("2,3"), visible_to_clients("5,-1,6"), visible_to_clients("GPU-5a")
    ('0,1', '0', 'GPU-5a')
    """
    indices = list(takewhile(str.isdigit, map(str.strip, visible.split(","))))
    return ",".join(str(i) for i in range(len(indices))) or visible


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
