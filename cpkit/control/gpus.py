"""Choose the device of a set of workers. The agent calls this before it starts the ranks."""

from __future__ import annotations

from typing import Literal

from cpkit.control.launch_options import Launch


def gpu_count() -> int:
    """Return the number of GPUs that torch sees, without creating a CUDA context."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(launch: Launch, gpus: int) -> tuple[Literal["cpu", "cuda"], str]:
    """Return the device of all ranks, and the reason in one line.

    `auto` chooses CUDA if there is a GPU. If there are more ranks than GPUs, the ranks share them.
    Raises ValueError for a device that this machine does not have.
    """
    if launch.device == "cpu":
        return "cpu", "ranks run on the CPU, as requested"
    if not gpus:
        if launch.device == "cuda":
            raise ValueError("--device is cuda, but torch sees no GPU here; use --device cpu")
        if launch.share_gpu:
            raise ValueError("--share-gpu needs a GPU, but torch sees none here; leave it out")
        return "cpu", "ranks run on the CPU: torch sees no GPU here"
    if is_shared(launch, gpus):
        if launch.share_gpu or gpus == 1:
            return "cuda", (
                f"{launch.nproc} ranks share 1 GPU: timings measure one shared memory, not a link "
                f"between GPUs"
            )
        return "cuda", (
            f"{launch.nproc} ranks share {gpus} GPUs: ranks of one GPU exchange rows inside its "
            f"memory; with --nproc {gpus}, each rank has a GPU of its own"
        )
    return "cuda", f"{launch.nproc} ranks, one GPU per rank"


def is_shared(launch: Launch, gpus: int) -> bool:
    """Return True when at least two ranks of this machine use the same GPU."""
    return launch.share_gpu or launch.nproc > gpus
