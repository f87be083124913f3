"""What a gather did, as a report that stays with its results."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cpkit.group import CPGroup
from cpkit.memory.path import BufferLocation, BufferPair, PathReport, decide, without_windows
from cpkit.memory.pool import SymmetricPool
from cpkit.symm import is_allocation_symmetric

_reports = WeakTensorKeyDictionary()
_IN_POOL = BufferLocation(segment=0, offset=0)
_ORDINARY = BufferLocation(other="ordinary memory", fault="unregistered")


def path_of_result(result: torch.Tensor) -> PathReport | None:
    """The path of the gather that made this very tensor; None for any other, and for its views."""
    report: PathReport | None = _reports.get(result)
    return report


def remember(group: CPGroup, path: PathReport, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Note the path with the group and with each result; returns the results."""
    group.last_path = path
    for result in results:
        _reports[result] = path
    return results


def path_of(algorithm: str, group: CPGroup, device: torch.device | None = None) -> PathReport:
    """What a gather by this algorithm does here, for the buffers that it makes for itself."""
    ordinary = "ordinary memory"
    if group.spans_hosts:
        reason = f"the group spans machines (ranks {list(group.ranks)}), which cannot share memory"
        return PathReport("fallback", reason, ordinary, ordinary)
    if not is_allocation_symmetric():
        reason = (
            "is_allocation_symmetric() is false: symmetric memory was switched off for this batch"
        )
        return PathReport("fallback", reason, ordinary, ordinary)
    pool = group.pools.get(device.type if device else "cpu")
    transport = pool.backend.transport() if isinstance(pool, SymmetricPool) else "posix"
    if algorithm == "padded":
        return _padded(transport)
    if transport.startswith("nccl") and algorithm != "direct":
        send = _IN_POOL if algorithm == "padded_symm" else _ORDINARY
        report = decide([BufferPair(send, _IN_POOL)] * group.size, group.rank, transport)
        assert isinstance(pool, SymmetricPool)
        return without_windows(report, pool.backend.window_problem())
    return PathReport("symmetric", *_SYMMETRIC_PATHS[algorithm])


def _padded(transport: str) -> PathReport:
    ordinary = "ordinary memory"
    if transport == "cuda":
        reason = (
            "NCCL refuses two ranks on one GPU, so each rank copied its shard into the pool, and "
            "its peers pulled it from there into ordinary memory"
        )
        return PathReport("staged", reason, "a copy in the pool", ordinary)
    reason = "algorithm 'padded' uses ordinary memory and the collective of torch.distributed"
    return PathReport("fallback", reason, ordinary, ordinary)


_SYMMETRIC_PATHS = {
    "padded_symm_recv": (
        "each rank stored its shard, padded in ordinary memory, into every peer's receive buffer",
        "ordinary memory",
        "in the pool",
    ),
    "padded_symm": (
        "each rank stored its padded shard into every peer's receive buffer",
        "in the pool",
        "in the pool",
    ),
    "direct": (
        "each rank stored its rows at their final place in every peer's output",
        "ordinary memory (read in place)",
        "in the pool",
    ),
}
