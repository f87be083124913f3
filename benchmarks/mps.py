"""NVIDIA's MPS daemon for the time of a benchmark: ranks that share a GPU run side by side."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

CONTROL = "nvidia-cuda-mps-control"


@contextmanager
def mps_daemon(*, enabled: bool) -> Iterator[dict[str, str]]:
    """Run a daemon of our own; gives the environment of its clients.

    One that runs already, told by CUDA_MPS_PIPE_DIRECTORY, is used and left alone. Raises
    FileNotFoundError where ranks share a GPU and the daemon's program is missing.
    """
    if not enabled:
        yield {}
        return
    settings = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield settings
        return
    if shutil.which(CONTROL) is None:
        raise FileNotFoundError(
            f"ranks share a GPU, which needs {CONTROL}; it comes with the driver"
        )
    with TemporaryDirectory(prefix="cpkit-mps-") as directory:
        places = {"CUDA_MPS_PIPE_DIRECTORY": directory, "CUDA_MPS_LOG_DIRECTORY": directory}
        environment = {**os.environ, **places}
        subprocess.run([CONTROL, "-d"], env=environment, check=True, timeout=60)
        try:
            yield {**settings, **places}
        finally:
            subprocess.run(
                [CONTROL], env=environment, input="quit\n", text=True, check=False, timeout=60
            )
