"""What an operation is: steps of every rank of the first group, and what rank 0 makes of them.

    rank 0   steps: report ─┐             ┌─▶ collect ─▶ replies to the client
    rank 1   steps: report ─┼─ gathered ──┘
    rank 2   (not in the first group: idle)

A step is short, because between two steps rank 0 looks whether the request was cancelled, and
whether somebody else waits for a turn.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
import torch

from cpkit.control.messages import Body, Message, Path, ReplyBody
from cpkit.group import CPGroup, forget_groups

B = TypeVar("B", bound=Message)
R = TypeVar("R", bound=msgspec.Struct)
Steps = Generator[R, None, R]


class RankState:
    """What a rank knows between requests.

    `held` are the blocks that a notebook holds in the pool of a cp_size. `round` differs from one
    request to the next and is equal on all ranks: rows stamped with it can't be those of an earlier
    request.
    """

    def __init__(self) -> None:
        self.held: dict[int, list[torch.Tensor]] = {}
        self.round = 0

    def reset(self) -> None:
        """Start clean after a failure inside a collective. Every rank calls it."""
        self.held.clear()
        forget_groups()


class Operation(Generic[B, R]):
    """One request on one rank."""

    report: ClassVar[type[Any]]

    def __init__(self, body: B) -> None:
        self.body = body

    def parts(self) -> Sequence[Body]:
        """The request as requests of one cp_size each; they are run one after the other."""
        return [self.body]  # type: ignore[list-item]  # every B is one of Body's types

    def cp_size(self) -> int:
        """Ranks that take part."""
        body: Any = self.body
        size: int = getattr(body, "workload", body).cp_size
        return size

    def steps(self, group: CPGroup, state: RankState) -> Steps[R]:
        """This rank's reports: one a yield, the last one returned. Collective over the group."""
        return self.only_step(group, state)
        yield  # makes this a generator, as all steps are

    def only_step(self, group: CPGroup, state: RankState) -> R:
        """The report of an operation that is over after one step."""
        raise NotImplementedError

    def collect(self, reports: list[R], *, over: bool) -> Iterator[ReplyBody]:
        """On rank 0: replies to one report from each rank; when `over`, the last is the result."""
        raise NotImplementedError


class Timed(Message, frozen=True):
    """One rank's times of one workload, in microseconds."""

    median_us: float
    min_us: float
    p95_us: float
    iterations: int
    stage_us: dict[str, float]
    path: Path
    path_reason: str
