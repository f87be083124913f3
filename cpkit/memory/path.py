"""Which path a gather takes, decided from where every rank's buffers are. Pure.

| path | what happens |
|---|---|
| `symmetric` | the ranks, or NCCL's symmetric kernel, store rows straight into peers' buffers |
| `staged` | each rank loads its peers' rows from their symmetric send buffers |
| `fallback` | the ordinary collective, without symmetric memory |

What a path requires depends on the *transport*, which moves the rows:

* `posix`, `cuda`: the ranks push into peers' memory (on one GPU, or over peer access). They need
  the receive buffer in the group's pool, at one offset on all ranks; with a symmetric send buffer
  alone, peers pull.
* `nccl 2.28.9`, or any other version: NCCL selects a kernel, by the rules in `NCCL_RULES`.
* `nccl 2.30.7 NCCL_CTA_POLICY=2`: the same NCCL with the policy ZERO. The same buffers then go
  through the copy engine, from the version in `NCCL_COPY_ENGINE` on.

A buffer is symmetric when three things hold on all ranks: it is registered, with *this* group, at
the same offset. The reason of a report says which of them fails. NCCL reads the send buffer through
this rank's own pointer, so only the offset of the receive buffer counts there.

NCCL does not read this report: it selects a kernel from the windows of this rank's buffers. So
`unsafe_for_nccl` says which buffers must not be passed to it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from cpkit.packing import describe_types

PathName = Literal["symmetric", "staged", "fallback"]
Version = tuple[int, ...]

# (first version, what an all-gather needs for NCCL's symmetric kernels). Source: NCCL's sources at
# the tags 2.27.7, 2.28.9, 2.29.2 (the first of 2.29), 2.30.7: scheduler/symmetric_sched.cc,
# sym_kernels.cc. From 2.29.2 on, AllGather_LL needs no window on the receive buffer, because it
# stages in its own memory. So with one registered buffer only, NCCL selects it for small messages
# if its older cost model selects the protocol LL too; with recv only, it may select the ring where
# the two differ. Seen in the log of 2.30.7, 64 KiB per rank on two H100s.
NCCL_RULES: tuple[tuple[Version, Literal["none", "both", "recv"]], ...] = (
    ((0,), "none"),
    ((2, 27), "both"),
    ((2, 29, 2), "recv"),
)
# First version that moves an all-gather of such buffers with the copy engine instead of a kernel,
# under NCCL_CTA_POLICY=2 (ZERO), with a driver of CUDA 12.5 or newer. On Blackwell, 2.29 and newer
# do so without that policy too, above NCCL_SYM_CE_THRESHOLD. Source: taskAppend in NCCL's
# enqueue.cc, and ncclCeImplemented and ncclCeAvailable in ce_coll.cc, at 2.28.7, 2.29 and 2.30.7.
NCCL_COPY_ENGINE = (2, 28)
# First and last version whose copy engine fails on the default stream, where torch 2.11 runs its
# collectives: cudaMemcpyBatchAsync refuses that stream, and the process ends (nccl#2003).
NCCL_COPY_ENGINE_FAILS = ((2, 28, 0), (2, 29, 6))
# First and last version whose symmetric kernels do not wait for the preceding kernel, which makes
# results silently wrong (sglang#37768).
NCCL_RACY = ((2, 28, 0), (2, 30, 4))
ZERO_POLICY = " NCCL_CTA_POLICY=2"  # at the end of a transport
COPY_ENGINE_FAILS = (
    "NCCL_CTA_POLICY=2 selects the copy engine, which fails on the default stream up to 2.29.6 "
    "(nccl#2003), so NCCL gets no windows: unset it, or use NCCL 2.29.7 or newer"
)

_REMEDY = {
    "unregistered": "make it inside `with use_symmetric_memory(group)` (SGLang #37337)",
    "foreign": "make it in this group's own pool, because a window belongs to one communicator "
    "(SGLang #19329)",
    "offset": "make the same tensors in the same order on all ranks (pytorch#178138)",
}


class BufferLocation(msgspec.Struct, frozen=True):
    """Where a buffer is: its segment and offset in the pool, or why it has none.

    `fault` is "unregistered" or "foreign", and `other` describes where the buffer is.
    """

    segment: int = -1
    offset: int = -1
    other: str = ""
    fault: str = ""

    def __str__(self) -> str:
        return self.other or f"in the pool: segment {self.segment}, offset {self.offset}"


class BufferPair(msgspec.Struct, frozen=True):
    """Where one rank's two buffers are, and the bytes of its shard."""

    send: BufferLocation
    recv: BufferLocation
    shard_bytes: int = 0


class PathReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The path of a gather on one rank, the reason, and where this rank's buffers are."""

    path: PathName
    reason: str
    send: str
    recv: str


def decide(
    pairs: list[BufferPair], rank: int, transport: str = "posix", *, has_windows: bool = True
) -> PathReport:
    """Return the path for buffers at these locations, as `rank` reports it; equal on all ranks.

    `has_windows=False` means that NCCL knows no memory of the pool (see `without_windows`).
    Raises ValueError for an unknown transport.
    """
    recv_fault = _fault("recv", [pair.recv for pair in pairs])
    send_fault = _fault("send", [pair.send for pair in pairs])
    version = nccl_version(transport)
    if version is None:
        path, reason = _pushed(send_fault, recv_fault, pairs[rank].shard_bytes)
    else:
        registered = _registration_fault("send", [pair.send for pair in pairs])
        policy_is_zero = transport.endswith(ZERO_POLICY)
        path, reason = _by_nccl(version, policy_is_zero, registered, recv_fault)
        reason = f"NCCL {transport.removeprefix('nccl ')}: {reason}"
        if any(unsafe_for_nccl(pairs)):
            reason += (
                "; NCCL gets ordinary copies of these buffers, because a symmetric kernel "
                "would store at wrong offsets on the peers"
            )
        has_windows = has_windows and not (policy_is_zero and copy_engine_fails(version))
        if has_windows and recv_fault and not send_fault and nccl_rule(version) == "recv":
            reason += "; for small messages this NCCL may select its staging kernel AllGather_LL"
    mine = pairs[rank]
    return PathReport(path, reason, str(mine.send), str(mine.recv))


def unsafe_for_nccl(pairs: list[BufferPair]) -> tuple[bool, bool]:
    """Return whether (send, recv) must be passed to NCCL as copies; the same on every rank.

    NCCL selects a kernel on each rank from the windows of that rank's buffers, and a symmetric
    kernel stores into every peer's window at *this* rank's receive offset:

        rank 0   recv at offset    0   │ stores at    0 of rank 1's window   wrong rows
        rank 1   recv at offset 4096   │ stores at 4096 of rank 0's window   wrong rows

    So a receive buffer in symmetric memory has to be at one offset of this group's pool on all
    ranks. A send buffer is read by its own rank only, so with such a receive buffer its offset may
    differ; but all ranks or none must have it in the pool, or they select different kernels.
    Measured with NCCL 2.28.9: shards of 2 MiB and more were wrong without an error.
    """
    recv = [pair.recv for pair in pairs]
    send = [pair.send for pair in pairs]
    recv_is_symmetric = not _fault("recv", recv)
    send_is_in_pool = not _registration_fault("send", send)
    safe_recv = _all_ordinary(recv) or recv_is_symmetric
    safe_send = (
        _all_ordinary(send) or (send_is_in_pool and recv_is_symmetric) or not _fault("send", send)
    )
    return not safe_send, not safe_recv


class Decision(NamedTuple):
    """The path of an equal-sized gather, and which buffers must be passed to NCCL as copies."""

    path: PathReport
    unsafe_send: bool
    unsafe_recv: bool


@lru_cache(maxsize=256)
def decide_from(
    locations: tuple[bytes, ...], rank: int, transport: str, window_problem: str
) -> Decision:
    """Decide from encoded BufferPairs, one per rank; cached, because buffers are reused."""
    pairs = [msgspec.msgpack.decode(each, type=BufferPair) for each in locations]
    report = decide(pairs, rank, transport, has_windows=not window_problem)
    path = without_windows(report, window_problem)
    return Decision(path, *unsafe_for_nccl(pairs))


def without_windows(report: PathReport, problem: str) -> PathReport:
    """Return the report for memory that NCCL has no windows on; unchanged if `problem` is empty."""
    if not problem or report.path != "symmetric":
        return report
    return PathReport("fallback", problem, report.send, report.recv)


def nccl_version(transport: str) -> Version | None:
    """Return (2, 28, 9) for "nccl 2.28.9", None for cpkit's transports. Raises ValueError.

    >>> nccl_version("nccl 2.28.9"), nccl_version("nccl 2.30.7 NCCL_CTA_POLICY=2")
    ((2, 28, 9), (2, 30, 7))
    """
    if transport in ("posix", "cuda"):
        return None
    found = re.fullmatch(rf"nccl (\d+(?:\.\d+)+)(?:{ZERO_POLICY})?", str(transport))
    if not found:
        raise ValueError(
            f"transport is {transport!r}; it must be 'posix', 'cuda', or NCCL with its version, "
            f"for example 'nccl 2.28.9' or 'nccl 2.30.7{ZERO_POLICY}'"
        )
    return tuple(int(part) for part in found[1].split("."))


def nccl_rule(version: Version) -> Literal["none", "both", "recv"]:
    """Return which buffers of an all-gather this NCCL needs in a symmetric window.

    >>> nccl_rule((2, 28, 9)), nccl_rule((2, 29, 7))
    ('both', 'recv')
    """
    return next(needs for first, needs in reversed(NCCL_RULES) if version >= first)


def copy_engine_fails(version: Version) -> bool:
    """Return True when this NCCL's copy engine ends the process on the default stream."""
    return NCCL_COPY_ENGINE_FAILS[0] <= version <= NCCL_COPY_ENGINE_FAILS[1]


def nccl_is_racy(version: Version) -> bool:
    """Return True when this NCCL's symmetric kernels have the race of sglang#37768."""
    return NCCL_RACY[0] <= version <= NCCL_RACY[1]


def _pushed(send_fault: str, recv_fault: str, shard_bytes: int) -> tuple[PathName, str]:
    if not recv_fault:
        also = f"; {send_fault}, which a push does not need" if send_fault else ", and so is send"
        if send_fault and shard_bytes:
            also += f"; padding copied up to {shard_bytes} bytes per rank"
        return "symmetric", f"recv is symmetric on all ranks{also}"
    if not send_fault:
        return "staged", f"{recv_fault}; peers pull from the symmetric send buffers"
    return "fallback", f"{recv_fault}; {send_fault}"


def _by_nccl(
    version: Version, policy_is_zero: bool, send_fault: str, recv_fault: str
) -> tuple[PathName, str]:
    needs = nccl_rule(version)
    if needs == "none":
        return "fallback", "symmetric kernels begin with 2.27; use a newer NCCL"
    if recv_fault:
        return "fallback", f"{recv_fault}" + (f"; {send_fault}" if send_fault else "")
    if needs == "both" and send_fault:
        return "fallback", (
            f"up to 2.28 an all-gather needs both buffers registered, and {send_fault}. "
            f"Or use NCCL 2.29.2 or newer, which needs recv only"
        )
    also = "" if send_fault else ", send is registered too"
    enough = (
        f"recv is registered at one offset on all ranks{also}, which is enough where all GPUs of "
        f"the group reach each other over NVLink; NCCL's log shows it (cpkit.memory.nccl_log)"
    )
    if policy_is_zero and version >= NCCL_COPY_ENGINE:
        if copy_engine_fails(version):
            return "fallback", COPY_ENGINE_FAILS
        return "symmetric", f"the copy engine moves the rows, without a kernel: {enough}"
    if nccl_is_racy(version):
        enough += "; its kernels do not wait for the kernel before them (sglang#37768)"
    return "symmetric", enough


def _fault(name: str, locations: list[BufferLocation]) -> str:
    """Return why these buffers are not symmetric, and what to do; empty when they are."""
    fault = _registration_fault(name, locations)
    offsets = [(location.segment, location.offset) for location in locations]
    if fault or len(set(offsets)) == 1:
        return fault
    listed = ", ".join(f"rank {r}: {s}/{o}" for r, (s, o) in enumerate(offsets))
    return f"{name} is at different segments/offsets on the ranks ({listed}); {_REMEDY['offset']}"


def _registration_fault(name: str, locations: list[BufferLocation]) -> str:
    """Return why a buffer is not in this group's pool, and what to do; empty when all are."""
    for rank, location in enumerate(locations):
        if location.other:
            remedy = _REMEDY.get(location.fault)
            return f"{name} of rank {rank} is {location.other}" + (f"; {remedy}" if remedy else "")
    return ""


def _all_ordinary(locations: list[BufferLocation]) -> bool:
    return all(location.fault == "unregistered" for location in locations)


describe_types(BufferPair, PathReport)
