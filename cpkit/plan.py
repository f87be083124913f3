"""A gather that is prepared once and made many times, as MPI's persistent collectives are.

The arguments are checked by all ranks when the plan is made; a call then only moves rows. And where
`all_gather_kv` has to meet all ranks before it may store into their outputs, a plan has nobody to
wait for: it takes its outputs in turns.

    call          1               2               3
    rank 0   store A │exit 1│ store B │exit 2│ store A │exit 3│
    rank 1   store A │exit 1│ read A … store B │exit 2│ read B … store A │exit 3│
                                     ↑ A is read         ↑ rank 0 may store into A from here on

Rank 0 stores into A again only once it is past exit 2, and nobody gets past exit 2 before rank 1
has come to it: so rank 1 is in call 2 by then, and done with A.

On CUDA the same holds in stream order, and a call replays a CUDA graph of one kernel. A plan that
is itself captured in a caller's graph keeps its entry barrier, since nothing tells how often that
graph is replayed. Ranks don't meet on the host there: plans that one rank calls in another order
than its peers are not noticed, and their rows are wrong.

So a result is valid until this rank calls the plan again. With one output, rank 0's second call
would store into A while rank 1 still reads it, and an entry barrier would be needed. `keep=2` takes
three outputs, and a result outlives one more call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

from cpkit import arguments, steps
from cpkit.devices import device_type, is_capturing
from cpkit.gather import all_gather_kv, enter
from cpkit.group import CPGroup
from cpkit.kernels.push import Copy
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.pool import SymmetricPool
from cpkit.paths import path_of, remember
from cpkit.stages import stage
from cpkit.symm import check_group, is_allocation_symmetric


@dataclass(frozen=True)
class _Turn:
    """One set of outputs, in the pool and as the caller sees them, the copies that fill it, and
    the wait after them.
    """

    copies: list[Copy]
    leave: Copy
    outputs: list[torch.Tensor]
    results: list[torch.Tensor]


class GatherPlan:
    """What `plan_gather_kv` returns: call it to gather. Every rank calls its own, in step."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        group: CPGroup,
        algorithm: str,
        turns: Sequence[_Turn],
        pool: SymmetricPool | None,
    ) -> None:
        self.metadata, self.group, self.algorithm = metadata, group, algorithm
        self._tensors = list(tensors)  # their memory is what the copies read
        self._pool = pool  # its maps are what the copies write through, also once it is replaced
        self._turns = cycle(turns) if turns else None
        self._path = path_of(algorithm, group, tensors[0].device)
        for turn in turns:
            remember(group, self._path, turn.results)

    def __call__(self) -> list[torch.Tensor]:
        """Gather what the plan's tensors hold now. Collective. Raises TimeoutError naming the ranks
        that did not come (on CUDA the next call does, or `group.check()` after a synchronization),
        CallsDiffer on every rank when one is in another call.
        """
        if self._turns is None:
            return all_gather_kv(self._tensors, self.metadata, self.group, algorithm=self.algorithm)
        turn = next(self._turns)
        with stage("wire"):
            for copy in turn.copies:
                copy()
        with stage("exit"):
            turn.leave()
        self.group.last_path = self._path
        return list(turn.results)


def plan_gather_kv(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    algorithm: str = "direct",
    keep: int = 1,
) -> GatherPlan:
    """Prepare `all_gather_kv(tensors, metadata, group)` for many calls with the same memory.

    Collective, as are the calls. The plan reads `tensors` where they are, so fill them anew before
    a call, and keep them contiguous. A result is valid until this rank calls the plan again;
    `keep=n` makes it valid until the n-th call after, and costs n + 1 outputs in the pool. Only
    `direct` in symmetric memory gains; other algorithms do what `all_gather_kv` does.

    Raises ValueError on every rank for what `all_gather_kv` refuses, for tensors that are not
    contiguous, and for a `keep` below 1. Source of the idea: MPI-4's MPI_Allgatherv_init.
    """
    check_group(group)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    problem, call = arguments.check_call(tensors, metadata, group, algorithm, symmetric)
    problem = problem or _problem(tensors, keep)
    if not problem and is_capturing(device_type(tensors[0])):
        problem = "a plan cannot be made while a CUDA graph is captured: make it before"
    call = "" if problem else f"plan, {keep=}: {call}"
    device = "cpu" if problem else device_type(tensors[0])
    pool = enter(group, call, problem, symmetric, device)
    turns: list[_Turn] = []
    if algorithm == "direct" and pool:
        made = [_outputs(tensors, metadata, pool) for _ in range(keep + 1)]
        turns = _take_turns(tensors, made, metadata, pool)
    return GatherPlan(tensors, metadata, group, algorithm, turns, pool)


def _outputs(
    tensors: Sequence[torch.Tensor], metadata: ContextParallelMetadata, pool: SymmetricPool
) -> list[torch.Tensor]:
    rows = [steps.as_rows(x) for x in tensors]
    return [pool.empty((metadata.total_tokens, x.shape[1]), x.dtype) for x in rows]


def _take_turns(
    tensors: Sequence[torch.Tensor],
    made: list[list[torch.Tensor]],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
) -> list[_Turn]:
    if pool.device.type == "cuda":
        from cpkit.kernels.cuda_push import prepare_pushes

        rows = [steps.as_rows(x) for x in tensors]
        pushes = prepare_pushes(rows, made, metadata, pool)
        return [
            _Turn([push], _waits_itself, outputs, _results(outputs, tensors))
            for push, outputs in zip(pushes, made, strict=True)
        ]
    board = pool.group.board
    assert board, "ranks that share memory have a board"
    return [
        _take_turn(tensors, outputs, metadata, pool, partial(board.barrier, board.new_call(number)))
        for number, outputs in enumerate(made)
    ]


def _results(outputs: list[torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [steps.from_rows(x, like) for x, like in zip(outputs, tensors, strict=True)]


def _take_turn(
    tensors: Sequence[torch.Tensor],
    outputs: list[torch.Tensor],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    leave: Copy,
) -> _Turn:
    rows = [steps.as_rows(x) for x in tensors]
    results = _results(outputs, tensors)
    with torch.inference_mode(False):  # else the copies could not be made outside that mode
        copies = [
            copy
            for x, output in zip(rows, outputs, strict=True)
            if output.numel()
            for copy in steps.push_copies(x, output, metadata, pool)
        ]
    return _Turn(copies, leave, outputs, results)


def _waits_itself() -> None:
    """The kernel has its exit synchronization inside."""


def _problem(tensors: Sequence[torch.Tensor], keep: int) -> str:
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        return f"keep is {keep!r}; it must be a whole number of calls, 1 or more"
    for number, x in enumerate(tensors):
        if x.numel() and steps.as_rows(x).data_ptr() != x.data_ptr():
            return (
                f"tensors[{number}] is a strided, conjugated or negated view, and a plan reads its "
                f"tensors where they are; pass a contiguous one, or call all_gather_kv"
            )
    return ""
