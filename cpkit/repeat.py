"""A gather that the ranks have made before: what remains when its preparation is kept.

A model makes the same call in every layer. The first call checks its arguments and prepares the
gather. A later one (except a large one on the CPU) only compares its fingerprint with those of the
other ranks, and gathers. For `direct`, these steps remain:

    fingerprint ── one exchange ── a block per output ── one launch (on the CPU: the copies)

They take a third of the Python functions that cpkit.gather needs for them. The number of functions
counts: one that takes 0.1 us in a loop of its own takes about 1 us in a call, because its code has
left the caches since the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import _C

from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import STORED_IN_PLACE, as_dense, bytes_per_row
from cpkit.memory.path import PathReport
from cpkit.memory.pool import SymmetricPool
from cpkit.stages import is_observed
from cpkit.sync.agreement import Signature
from cpkit.validate import LARGE_BYTES, call_key

Tensors = Sequence[torch.Tensor]
Gathered = tuple[list[torch.Tensor], PathReport]
Gather = Callable[[Tensors, ContextParallelMetadata, SymmetricPool], Gathered]
_MAX_REPEATED = 256


class RepeatedGather:
    """A gather whose checks have passed.

    `gather` is the function that made it at first, and `repeat` does the same. With `reports`, a
    failure in `repeat` is reported to the peers, which are then waiting at a barrier.
    """

    def __init__(
        self,
        gather: Gather,
        repeat: Gather,
        signature: Signature,
        metadata: ContextParallelMetadata,
        *,
        reports: bool,
    ) -> None:
        self.gather, self._repeat, self._reports = gather, repeat, reports
        self._signature, self._metadata = signature, metadata

    def __call__(self, group: CPGroup, tensors: Tensors) -> Gathered:
        """Gather; see all_gather_kv. Collective."""
        pool = group.pools["cuda" if tensors[0].is_cuda else "cpu"]
        assert isinstance(pool, SymmetricPool)
        pool.agree_again(self._signature)
        try:
            return self._repeat(tensors, self._metadata, pool)
        except Exception as error:
            if self._reports:
                group.report_failure(error)
            raise


class RepeatedPush:
    """`direct` with everything prepared that depends on its layout and its shapes."""

    def __init__(
        self, tensors: Tensors, metadata: ContextParallelMetadata, pool: SymmetricPool
    ) -> None:
        self._push = pool.backend.repeat(metadata, [bytes_per_row(x) for x in tensors])
        shapes = [(metadata.total_tokens, *x.shape[1:]) for x in tensors]
        self._outputs = [
            (math.prod(shape) * x.dtype.itemsize, shape, x.dtype)
            for shape, x in zip(shapes, tensors, strict=True)
        ]

    @property
    def is_possible(self) -> bool:
        """Whether the backend can repeat it, and no output is empty."""
        return self._push is not None and all(nbytes for nbytes, *_ in self._outputs)

    def __call__(
        self, tensors: Tensors, metadata: ContextParallelMetadata, pool: SymmetricPool
    ) -> Gathered:
        """Gather as `direct` does."""
        assert self._push
        rows = [as_dense(x) for x in tensors]
        blocks = [pool.take(*output) for output in self._outputs]
        self._push([x.data_ptr() for x in rows], [place for place, _ in blocks])
        return [output for _, output in blocks], STORED_IN_PLACE


def find_repeated(
    tensors: Tensors, metadata: ContextParallelMetadata, group: CPGroup, algorithm: str
) -> RepeatedGather | None:
    """Return what an earlier call like this one kept; None if this call needs every step. Local.

    Every step is needed if the stages of the call are recorded, if it is traced or captured in a
    CUDA graph, or if a dispatch mode changes what operations return. If the search fails, the
    checks of the call report the fault to all ranks. Raises RuntimeError in a thread other than the
    group's.
    """
    group.check_thread()  # first: a forked child must not call CUDA
    try:
        key = call_key(tensors, metadata, algorithm, symmetric=True)
        if key is None or is_observed() or _C._len_torch_dispatch_stack():
            return None
        if _C._get_tracing_state() is not None:
            return None
        on_cuda = tensors[0].is_cuda
        pool = group.pools.get("cuda" if on_cuda else "cpu")
        if not isinstance(pool, SymmetricPool):
            return None
        if on_cuda and _C._cuda_isCurrentStreamCapturing():  # `is_capturing` takes longer
            return None
        return pool.repeated.get(key)
    except Exception:  # noqa: BLE001 - the checks of the call report it
        return None


def keep_to_repeat(
    tensors: Tensors,
    metadata: ContextParallelMetadata,
    group: CPGroup,
    algorithm: str,
    gather: Gather,
    is_direct: bool,
    is_padded: bool,
) -> None:
    """Keep what is needed to repeat a call that has succeeded. Local.

    A large gather on the CPU is not repeated: it looks for room in memory at every call. An error
    here is ignored, because this rank already has its result, like its peers.
    """
    with suppress(Exception):
        key = call_key(tensors, metadata, algorithm, symmetric=True)
        signature = group.checked_calls.get(key)
        if signature is None or signature.nbytes > LARGE_BYTES:
            return
        on_cuda = tensors[0].is_cuda
        pool = group.pools.get("cuda" if on_cuda else "cpu")
        if not isinstance(pool, SymmetricPool):
            return
        if key in pool.repeated and pool.repeated[key].gather is gather:
            return
        if len(pool.repeated) >= _MAX_REPEATED:
            pool.repeated.clear()
        repeat = gather
        if is_direct and (push := RepeatedPush(tensors, metadata, pool)).is_possible:
            repeat = push
        reports = not (is_padded or on_cuda)
        pool.repeated[key] = RepeatedGather(gather, repeat, signature, metadata, reports=reports)
