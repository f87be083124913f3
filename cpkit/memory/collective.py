"""torch.distributed without symmetric memory: the collective, and an exchange of notes.

Every gather that NCCL makes for cpkit goes through `plain_all_gather`. NCCL decides by the address
of a buffer which kernel it takes, whatever the caller means, so the default is safe: a buffer in
symmetric memory is replaced by an ordinary copy unless the caller says that the ranks have agreed.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
import torch.distributed as dist

from cpkit.devices import device_problem, grad_problem, stores_as_shown
from cpkit.sync.barrier import NOTE_BYTES


class Members(Protocol):
    """What of a group is needed here."""

    process_group: dist.ProcessGroup
    has_nccl: bool


def gather_problem(output: torch.Tensor, input: torch.Tensor, size: int) -> str:
    """Why `output` can't take `size` shards like `input`; empty when it can."""
    for name, x in (("output", output), ("input", input)):
        if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
            return f"{name} is {type(x).__name__}; it must be an ordinary strided tensor"
        problem = device_problem(name, x) or grad_problem(name, x)
        if problem:
            return problem
    if output.device != input.device:
        return f"output is on {output.device} and input on {input.device}; use one device"
    want = [input.shape[0] * size, *input.shape[1:]] if input.ndim else None
    if input.ndim < 1 or list(output.shape) != want or output.dtype != input.dtype:
        return (
            f"cannot gather {size} shards of {describe(input)} into {describe(output)}: "
            f"output must be {want} of the same dtype"
        )
    if not (output.is_contiguous() and stores_as_shown(output)):
        return f"output {describe(output)} must be contiguous, no conjugated view"
    return ""


def flat_bytes(x: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor in one dimension; a view of it where it is contiguous."""
    dense = x.detach().resolve_conj().resolve_neg().contiguous()
    # One element counts as contiguous whatever its stride is; here it must be 1.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def describe(*tensors: torch.Tensor) -> str:
    """Shapes, dtypes and devices in words: `[8, 128] bfloat16`, on a GPU `… bfloat16 cuda`."""
    return " <- ".join(
        f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        + ("" if t.device.type == "cpu" else f" {t.device.type}")
        for t in tensors
    )


class Segment(Protocol):
    """What of a segment is needed here: where each rank's memory is in this process."""

    nbytes: int
    addresses: list[int]


_segments: weakref.WeakKeyDictionary[Segment, int] = weakref.WeakKeyDictionary()


def register_segment(segment: Segment, rank: int) -> None:
    """Remember memory that is symmetric for as long as it lives, whatever becomes of its pool."""
    _segments[segment] = rank


def in_symmetric_memory(x: torch.Tensor) -> bool:
    """True when this rank's tensor begins in a segment of any group."""
    address = x.data_ptr()
    return any(
        0 <= address - segment.addresses[rank] < segment.nbytes
        for segment, rank in list(_segments.items())
    )


def ordinary_copy(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy in ordinary memory of one in symmetric memory."""
    return x.clone() if in_symmetric_memory(x) else x


def plain_all_gather(
    output: torch.Tensor,
    input: torch.Tensor,
    group: Members,
    *,
    symmetric_send: bool = False,
    symmetric_recv: bool = False,
) -> None:
    """The collective of torch.distributed, on bytes: not every dtype is known to every backend.

    CUDA tensors go through NCCL where each rank has a GPU of its own, else over the host and gloo.
    NCCL gets a buffer in symmetric memory as it is only where `symmetric_send`, `symmetric_recv`
    say that all ranks have agreed to it (`path.unsafe_for_nccl`).
    """
    if output.numel() == 0:
        return
    recv, send = (flat_bytes(t) for t in (output, input))
    if recv.device.type == "cpu":
        _all_gather_single(recv, send, group.process_group)
    elif not group.has_nccl:
        host = torch.empty(recv.shape, dtype=recv.dtype, device="cpu")
        _all_gather_single(host, send.cpu(), group.process_group)
        recv.copy_(host)
    else:
        send = send if symmetric_send else ordinary_copy(send)
        target = recv if symmetric_recv else ordinary_copy(recv)
        _all_gather_single(target, send, group.process_group)
        if target is not recv:
            recv.copy_(target)


def _all_gather_single(
    output: torch.Tensor, input: torch.Tensor, process_group: dist.ProcessGroup
) -> None:
    # torch 2.13 renamed the collective and deprecates the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, input, group=process_group)


def exchange_over(process_group: dist.ProcessGroup, note: bytes, size: int) -> list[bytes]:
    """The board's exchange for ranks without one: notes of one fixed size, through the backend."""
    mine = torch.zeros(8 + NOTE_BYTES, dtype=torch.uint8, device="cpu")
    data = len(note).to_bytes(8, "little") + note
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everybody = torch.empty(size * len(mine), dtype=torch.uint8, device="cpu")
    _all_gather_single(everybody, mine, process_group)
    pages = [bytes(page.numpy()) for page in everybody.view(size, -1)]
    return [page[8 : 8 + int.from_bytes(page[:8], "little")] for page in pages]
