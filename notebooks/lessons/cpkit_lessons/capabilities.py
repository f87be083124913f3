"""What these workers can show, and what they can't, with the reason.

The same notebooks run on CPU ranks, on one GPU that all ranks share, and on a GPU for each rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpkit.control.results import StatusResult

TierName = Literal["cpu", "one_gpu", "gpus"]
VERIFIED_WITH = "torch 2.13.0, Python 3.11, Linux"


@dataclass(frozen=True)
class Lack:
    """One thing a tier can't show: what, why, and what is shown instead."""

    what: str
    why: str
    instead: str


@dataclass(frozen=True)
class Tier:
    """Where the ranks run."""

    name: TierName
    title: str
    lacks: tuple[Lack, ...]

    def __str__(self) -> str:
        lines = [f"- {lack.what}: {lack.why}. Instead: {lack.instead}." for lack in self.lacks]
        return "\n".join([self.title, *(["Not here:"] if lines else []), *lines])


_NO_LINKS = Lack(
    "NVLink bandwidth", "the ranks have no links between them", "figures recorded on an H200"
)
TIERS: dict[TierName, Tier] = {
    "cpu": Tier(
        "cpu",
        "CPU ranks that share POSIX memory: all results are real, times are those of this memory",
        (
            _NO_LINKS,
            Lack("kernels and streams", "nothing runs on a GPU", "the same passes as CPU copies"),
        ),
    ),
    "one_gpu": Tier(
        "one_gpu",
        "all ranks on one GPU: real kernels and barriers, but every byte stays in one memory",
        (
            _NO_LINKS,
            Lack(
                "multicast",
                "it is off where ranks share a device (pytorch#140127)",
                "what was recorded elsewhere, labelled so",
            ),
        ),
    ),
    "gpus": Tier("gpus", "one GPU for each rank: everything is live", ()),
}


def tier_of(status: StatusResult) -> Tier:
    """The tier of a set of workers."""
    if status.device == "cpu":
        return TIERS["cpu"]
    places = {(worker.host, worker.device) for worker in status.workers}
    return TIERS["one_gpu" if len(places) < status.world_size else "gpus"]


def describe(status: StatusResult) -> str:
    """Ranks, versions beside those that were verified, and the tier with what it lacks."""
    return (
        f"{status.world_size} ranks on {status.device}; torch {status.torch_version} "
        f"(verified with {VERIFIED_WITH}); symmetric memory: {status.symmetric_backend}\n"
        f"{tier_of(status)}"
    )
