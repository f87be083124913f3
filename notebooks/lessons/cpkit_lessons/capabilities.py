"""What the running workers can demonstrate, and what they cannot, with the reason.

The same notebooks run on CPU ranks, on one GPU that all ranks share, and on one GPU per rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpkit.control.results import StatusResult

VERIFIED_WITH = "torch 2.13.0, Python 3.11, Linux"


@dataclass(frozen=True)
class Limitation:
    """One thing that cannot be demonstrated: what, why, and what is shown instead."""

    what: str
    why: str
    instead: str


@dataclass(frozen=True)
class Capabilities:
    """The name of one kind of machine, and what it cannot demonstrate."""

    name: str
    title: str
    limitations: tuple[Limitation, ...]

    def __str__(self) -> str:
        lines = [f"- {it.what}: {it.why}. {it.instead}." for it in self.limitations]
        return "\n".join([self.title, *(["Not available here:"] if lines else []), *lines])


_NO_LINKS = Limitation(
    "NVLink bandwidth",
    "the ranks have no links between them",
    "The notebooks show recordings of GPUs with NVLink, and label them",
)
CPU = Capabilities(
    "cpu",
    "The ranks are CPU processes that share memory. All results are real, but the times are those "
    "of this memory, not of links between GPUs.",
    (
        _NO_LINKS,
        Limitation(
            "kernels and streams",
            "nothing runs on a GPU",
            "CPU copies read and write the data as often as the kernels would",
        ),
    ),
)
ONE_GPU = Capabilities(
    "one_gpu",
    "The ranks share a GPU. Kernels and barriers are real, but all bytes stay in one memory.",
    (
        _NO_LINKS,
        Limitation(
            "multicast",
            "it is off where ranks share a device (pytorch#140127)",
            "The notebooks show recordings from other machines, and label them",
        ),
    ),
)
GPU_PER_RANK = Capabilities("gpus", "Each rank has its own GPU, so everything runs live.", ())


def capabilities_of(status: StatusResult) -> Capabilities:
    """Return the capabilities of a set of workers."""
    if status.device == "cpu":
        return CPU
    devices = {(worker.host, worker.device) for worker in status.workers}
    return GPU_PER_RANK if len(devices) == status.world_size else ONE_GPU


def describe(status: StatusResult) -> str:
    """Return the ranks, the installed and the verified versions, and the capabilities."""
    return (
        f"{status.world_size} ranks on {status.device}; torch {status.torch_version} "
        f"(verified with {VERIFIED_WITH}); symmetric memory: {status.symmetric_backend}\n"
        f"{capabilities_of(status)}"
    )
