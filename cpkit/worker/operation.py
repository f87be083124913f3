"""An operation: steps on every rank of the first group, and reports that rank 0 joins.

    rank 0   steps: report ─┐             ┌─▶ collect ─▶ replies to the client
    rank 1   steps: report ─┼─ gathered ──┘
    rank 2   (not in the first group: idle)

A report is a reply that contains one rank's part. Steps are short, because rank 0 cancels requests
and serves waiting ones between two steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch

from cpkit.control.messages import Body, Message, Progress, ReplyBody
from cpkit.group import CPGroup, forget_groups

B = TypeVar("B", bound=Message)
Steps = Generator[ReplyBody, None, ReplyBody]
Held = Mapping[tuple[bytes, int], int]
CHUNK_S = 0.05  # target duration of a step
SHORT_S = 0.25  # a round of calls that takes less runs once more after a pause, untimed
_NO_CLIENT = b""


class RankState:
    """The state of a rank between requests.

    `held` contains, per client and cp_size, the pool blocks that the client has allocated and not
    released. `arenas` contains, per cp_size, the clients that need the arena's size, and its bytes
    on all ranks, which are counted as held by the first of them. `client` is that of the current
    step. `round` differs between consecutive requests and is equal on all ranks. Rows are stamped
    with it, so that rows of an earlier request are detected.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[bytes, int], list[torch.Tensor]] = {}
        self.arenas: dict[int, tuple[list[bytes], int]] = {}
        self.client = b""
        self.round = 0

    def held_bytes(self) -> Held:
        """Return the bytes on all ranks of the blocks and arenas, by client and cp_size."""
        held = Counter[tuple[bytes, int]]()
        for (client, cp_size), blocks in self.held.items():
            held[client, cp_size] += cp_size * sum(block.nbytes for block in blocks)
        for cp_size, (clients, nbytes) in self.arenas.items():
            first, *others = clients or [_NO_CLIENT]
            held[first, cp_size] += nbytes
            held.update(dict.fromkeys([(other, cp_size) for other in others], 0))
        return held

    def reset(self) -> None:
        """Drop all state after a failure inside a collective. Call it on every rank."""
        self.held.clear()
        self.arenas.clear()
        forget_groups()


class Operation(Generic[B]):
    """One request on one rank."""

    report: ClassVar[Any] = ReplyBody

    def __init__(self, body: B) -> None:
        self.body = body

    def parts(self) -> Sequence[Body]:
        """Return the request as requests of one cp_size each, which run in order."""
        return [self.body]  # type: ignore[list-item]  # every B is one of Body's types

    def cp_size(self) -> int:
        """Return the number of ranks that run the operation."""
        body: Any = self.body
        size: int = getattr(body, "workload", body).cp_size
        return size

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Yield a report after each step, and return the last one. Collective over the group."""
        return self.only_step(group, state)
        yield  # unreachable; makes this function a generator

    def only_step(self, group: CPGroup, state: RankState) -> ReplyBody:
        """Return the report of an operation that has one step."""
        raise NotImplementedError

    def interval_s(self, report: ReplyBody) -> float:
        """Return the seconds from the start of the step with this report to that of the next."""
        return 0.0

    def collect(self, reports: list[Any], *, over: bool) -> Iterator[ReplyBody]:
        """On rank 0, yield the replies for one report per rank; if `over`, also the result."""
        first = reports[0]
        yield first if isinstance(first, Progress) else first.of_all_ranks(reports)
