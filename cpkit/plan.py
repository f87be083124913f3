"""A gather that is prepared once and called many times, like MPI's persistent collectives.

All ranks check the arguments when the plan is made; a call then only moves rows. `all_gather_kv`
needs an agreement before it stores into the peers' outputs. A plan stores without waiting, because
it alternates between outputs:

    call          1               2               3
    rank 0   store A │exit 1│ store B │exit 2│ store A │exit 3│
    rank 1   store A │exit 1│ read A … store B │exit 2│ read B … store A │exit 3│
                                     ↑ A was read        ↑ rank 0 may store into A from here on

Rank 0 stores into A again only after exit 2, and exit 2 completes only when rank 1 has arrived at
it: rank 1 is in call 2 by then, and has finished with A.

On CUDA the same holds in stream order, and a call replays a CUDA graph of one kernel. A plan that
is itself captured in a caller's graph keeps its entry barrier, because the number of replays of
that graph is unknown. Ranks do not synchronize on the host there. The kernels' signals carry the
number of the call, so if one rank calls its plans in a different order, the next call raises.

A result is valid until this rank calls the plan again. With one output, rank 0's second call would
store into A while rank 1 still reads it, and an entry barrier would be needed. `keep=2` uses three
outputs, and a result stays valid for one more call.

The prepared copies use addresses, like the kernels of a CUDA graph, so a call first checks that no
memory has moved on this rank, and that no gradient would be dropped. Otherwise the rank arrives at
the exit barrier as `REFUSED`, and all its peers raise as well. On CUDA, their kernels time out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import NoReturn

import torch
from torch.autograd import forward_ad

from cpkit.devices import check_no_grad, is_capturing
from cpkit.eager import eager_only
from cpkit.gather import all_gather_kv, memory_of, remember_path
from cpkit.group import CPGroup, is_allocation_symmetric
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import Prepared, as_rows, from_rows
from cpkit.memory.path import PathReport
from cpkit.memory.pool import SymmetricPool
from cpkit.stages import stage
from cpkit.sync.agreement import Signature, describe_error
from cpkit.sync.barrier import REFUSED, BarrierTimeout, CallsDiffer, RankFailed
from cpkit.validate import check_call, check_group

_is_set_to = torch.Tensor.is_set_to


class GatherPlan:
    """A prepared gather, made by `plan_gather_kv`. All ranks call their plans in the same order.

    `pushes` are the prepared calls and their results, used cyclically; if there are none, a call is
    an ordinary `all_gather_kv`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        group: CPGroup,
        algorithm: str,
        pushes: Sequence[tuple[Prepared, list[torch.Tensor]]] = (),
        path: PathReport | None = None,
        pool: SymmetricPool | None = None,
    ) -> None:
        self.metadata, self.group, self.algorithm = metadata, group, algorithm
        self._tensors = list(tensors)
        self._pool = pool  # the pushes write through its maps, even after it is replaced
        calls = []
        for push, results in pushes:
            planned = [x.detach() for x in results]  # these also keep the memory
            used = (*tensors, *planned)
            calls.append((push, results, planned, used, [x.data_ptr() for x in used]))
        self._pushes = cycle(calls) if calls else None
        self._path = path

    @eager_only
    def __call__(self) -> list[torch.Tensor]:
        """Gather the current contents of the plan's tensors. Collective.

        Raises TimeoutError naming late ranks, and CallsDiffer on every rank when the ranks are in
        different calls; on CUDA the next call does, or `group.check()` after a synchronization.
        Raises ValueError when the memory of a tensor or of a result has moved on this rank, or when
        a tensor requires grad; the peers raise CallsDiffer (on CUDA TimeoutError). If a rank fails
        in the call, its peers raise RankFailed (on CUDA TimeoutError).
        """
        if self._pushes is None:
            return all_gather_kv(self._tensors, self.metadata, self.group, algorithm=self.algorithm)
        self.group.check_thread()
        push, results, planned, used, addresses = next(self._pushes)
        if [x.data_ptr() for x in used] != addresses:
            self._refuse(self._moved(used, addresses))
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            self._check_no_grad()
        if not all(map(_is_set_to, results, planned)):  # a caller changed a shape in place
            results[:] = [x.detach() for x in planned]
        try:
            push()
        except (BarrierTimeout, CallsDiffer, RankFailed):
            raise
        except Exception as error:
            if self._tensors[0].device.type == "cpu" and self.group.shm_barrier:
                self.group.shm_barrier.fail(describe_error(error))
            raise
        self.group.last_path = self._path
        return list(results)

    def _check_no_grad(self) -> None:
        """Check the tensors again: an in-place operation can give them a gradient at any time."""
        for number, x in enumerate(self._tensors):
            try:
                check_no_grad(f"tensors[{number}]", x)
            except ValueError as error:
                self._refuse(error)

    def _moved(self, used: Sequence[torch.Tensor], addresses: list[int]) -> ValueError:
        names = [f"tensors[{i}]" for i in range(len(self._tensors))]
        names += [f"the result of {name}" for name in names]
        moved = [
            name
            for name, x, address in zip(names, used, addresses, strict=True)
            if x.data_ptr() != address
        ]
        return ValueError(
            f"the memory of {', '.join(moved)} has moved since the plan was made (for example by "
            f"share_memory_(), by a multiprocessing queue, or by setting .data), and a plan uses "
            f"its tensors in place; make a new plan, and put a clone() into queues"
        )

    def _refuse(self, error: ValueError) -> NoReturn:
        """Raise here, and CallsDiffer on the peers, which wait at the barrier."""
        barrier = self.group.shm_barrier
        if barrier and self._tensors[0].device.type == "cpu":
            with suppress(BarrierTimeout, CallsDiffer):
                barrier.barrier(REFUSED)
        raise error


@eager_only
def plan_gather_kv(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    algorithm: str = "direct",
    keep: int = 1,
) -> GatherPlan:
    """Prepare `all_gather_kv(tensors, metadata, group)` for many calls with the same memory.

    Collective, as are the calls. The plan reads `tensors` in place, in the layout that they have
    now: write new rows into them before each call. A result is valid until this rank calls the plan
    again; `keep=n` makes it valid until the n-th later call, and costs n + 1 outputs in the pool.
    Only `direct` in symmetric memory gets faster; other algorithms do what `all_gather_kv` does.

    Raises ValueError on every rank for arguments that `all_gather_kv` rejects, tensors that are not
    contiguous, and a `keep` below 1. Source of the idea: MPI-4's MPI_Allgatherv_init.
    """
    check_group(group)
    symmetric = is_allocation_symmetric() and not group.spans_hosts
    with stage("agree"), group.agreement(tensors) as call:
        call.must_match(check_call(tensors, metadata, group, algorithm, symmetric))
        _check_plan(tensors, keep)
        call.must_match(Signature(f"plan, {keep=}"))
    memory = memory_of(group, tensors[0].device, symmetric)
    if algorithm != "direct" or not isinstance(memory, SymmetricPool):
        return GatherPlan(tensors, metadata, group, algorithm)
    rows = [as_rows(x) for x in tensors]
    try:
        with torch.inference_mode(False):  # a later call outside it may need a gradient
            output_sets = [
                [memory.empty((metadata.total_tokens, x.shape[1]), x.dtype) for x in rows]
                for _ in range(keep + 1)
            ]
        pushes, path = memory.backend.prepare(memory, rows, output_sets, metadata)
        if memory.device.type == "cpu":
            group.barrier()  # a rank that failed arrives here with its error
    except Exception as error:
        if memory.device.type == "cpu":
            group.report_failure(error)
        raise
    with torch.inference_mode(False):
        result_sets = [
            [from_rows(x, like) for x, like in zip(outputs, tensors, strict=True)]
            for outputs in output_sets
        ]
    for results in result_sets:
        remember_path(group, results, path)
    pairs = list(zip(pushes, result_sets, strict=True))
    return GatherPlan(tensors, metadata, group, algorithm, pairs, path, memory)


def _check_plan(tensors: Sequence[torch.Tensor], keep: int) -> None:
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise ValueError(f"keep is {keep!r}; it must be a whole number of calls, 1 or more")
    for number, x in enumerate(tensors):
        if x.numel() and as_rows(x).data_ptr() != x.data_ptr():
            raise ValueError(
                f"tensors[{number}] is a strided, conjugated or negated view, and a plan reads its "
                f"tensors in place; pass a contiguous tensor, or call all_gather_kv"
            )
    if is_capturing(tensors[0].device.type):
        raise ValueError("a plan cannot be made while a CUDA graph is captured: make it before")
