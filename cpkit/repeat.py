"""A `direct` gather that the ranks have made before: what remains of a call without its checks.

A model makes the same call in every layer. The first call checks its arguments and finds what
depends on their shapes; a later one consists of four steps:

    fingerprint ── one exchange ── a block per output ── one launch (on the CPU: the copies)

They are those of cpkit.gather in a third of the Python functions, and what counts here is that
number: a function that takes 0.1 us in a loop of its own takes about 1 us in a call, because its
code has left the caches since the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cpkit.devices import is_capturing
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import Repeated, as_dense, bytes_per_row
from cpkit.memory.pool import SymmetricPool
from cpkit.stages import is_observed
from cpkit.sync.agreement import Signature
from cpkit.validate import LARGE_BYTES, call_key

_MAX_REPEATED = 256


class RepeatedGather:
    """The outputs and the push of a gather, and the signature that the ranks compare."""

    def __init__(
        self,
        signature: Signature,
        tensors: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        push: Repeated,
    ) -> None:
        self._signature, self._push = signature, push
        shapes = [(metadata.total_tokens, *x.shape[1:]) for x in tensors]
        self._outputs = [
            (math.prod(shape) * x.dtype.itemsize, shape, x.dtype)
            for shape, x in zip(shapes, tensors, strict=True)
        ]

    def __call__(self, group: CPGroup, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gather; see all_gather_kv. Collective."""
        pool = group.pools[tensors[0].device.type]
        assert isinstance(pool, SymmetricPool)
        pool.agree_again(self._signature)
        try:
            rows = [as_dense(x) for x in tensors]
            blocks = [pool.take(*output) for output in self._outputs]
            self._push([x.data_ptr() for x in rows], [place for place, _ in blocks])
        except Exception as error:
            if not tensors[0].is_cuda:
                group.report_failure(error)
            raise
        return [output for _, output in blocks]


def find_repeated(
    tensors: Sequence[torch.Tensor], metadata: ContextParallelMetadata, group: CPGroup
) -> RepeatedGather | None:
    """Return what an earlier call like this one kept; None if this call needs every step. Local.

    A call whose stages are recorded needs them, and one that a CUDA graph captures.
    """
    key = call_key(tensors, metadata, "direct", symmetric=True)
    if key is None or is_observed():
        return None
    on_cuda = tensors[0].is_cuda
    pool = group.pools.get("cuda" if on_cuda else "cpu")
    if not isinstance(pool, SymmetricPool) or (on_cuda and is_capturing("cuda")):
        return None
    return pool.repeated.get(key)


def keep_to_repeat(
    tensors: Sequence[torch.Tensor], metadata: ContextParallelMetadata, group: CPGroup
) -> None:
    """Keep what a call that has succeeded needs when it is repeated. Local.

    A large gather on the CPU is not repeated: it looks for room in memory at every call.
    """
    key = call_key(tensors, metadata, "direct", symmetric=True)
    signature = group.checked_calls.get(key)
    row_bytes = [bytes_per_row(x) for x in tensors]
    if signature is None or signature.nbytes > LARGE_BYTES or not all(row_bytes):
        return
    pool = group.pools[tensors[0].device.type]
    assert isinstance(pool, SymmetricPool)
    if key in pool.repeated:
        return
    push = pool.backend.repeat(metadata, row_bytes)
    if push and metadata.total_tokens:
        if len(pool.repeated) >= _MAX_REPEATED:
            pool.repeated.clear()
        pool.repeated[key] = RepeatedGather(signature, tensors, metadata, push)
