"""Which kind of device a set of workers runs on, decided by the agent before there are ranks."""

from __future__ import annotations

from typing import Literal

from cpkit.control.launch_options import Launch


def gpu_count() -> int:
    """GPUs that torch sees. Does not touch them: their driver is asked."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(launch: Launch, gpus: int) -> tuple[Literal["cpu", "cuda"], str]:
    """The device of all ranks, and a line that says why. Raises ValueError for what can't be.

    `auto` takes CUDA where there is a GPU. Ranks that outnumber the GPUs share them.
    """
    if launch.device == "cpu":
        return "cpu", "ranks run on the CPU, as asked"
    if not gpus:
        if launch.device == "cuda":
            raise ValueError("--device is cuda, and torch sees no GPU here; use --device cpu")
        if launch.share_gpu:
            raise ValueError("--share-gpu needs a GPU, and torch sees none here; leave it out")
        return "cpu", "ranks run on the CPU: torch sees no GPU here"
    if launch.nproc > gpus or launch.share_gpu:
        used = 1 if launch.share_gpu else gpus
        return "cuda", (
            f"{launch.nproc} ranks share {used} GPU(s): their times are those of one crowded "
            f"memory, not of a link between GPUs"
        )
    return "cuda", f"{launch.nproc} ranks, each with a GPU of its own"


def is_shared(launch: Launch, gpus: int) -> bool:
    """Whether two ranks of this machine will have the same GPU."""
    return launch.share_gpu or launch.nproc > gpus
