"""The collectives of torch.distributed: an all-gather, and an exchange of small messages.

Every gather that NCCL performs for cpkit goes through `torch_all_gather`. NCCL selects its
kernel by the address of a buffer alone. So the default is safe: a buffer in symmetric memory is
replaced by an ordinary copy unless the caller states that the ranks agreed.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from cpkit.devices import check_no_grad, check_tensor, is_plain_view, plain_class
from cpkit.sync.barrier import MAX_MESSAGE_BYTES


class Members(Protocol):
    """The part of a group that the collectives use."""

    process_group: dist.ProcessGroup
    has_nccl: bool


def check_gather(output: torch.Tensor, input: torch.Tensor, rank: int, size: int) -> None:
    """Check that `output` has room for `size` shards like `input`. Raises ValueError.

    The gather can be in place: `input` is then the part of `output` that belongs to this rank.
    """
    for name, x in (("output", output), ("input", input)):
        check_tensor(name, x)
        check_no_grad(name, x)
    if output.device != input.device:
        raise ValueError(
            f"output is on {output.device} and input on {input.device}; use one device"
        )
    want = [input.shape[0] * size, *input.shape[1:]] if input.ndim else None
    if input.ndim < 1 or list(output.shape) != want or output.dtype != input.dtype:
        raise ValueError(
            f"cannot gather {size} shards of {describe(input)} into {describe(output)}: "
            f"output must be {want} of the same dtype"
        )
    if not (output.is_contiguous() and is_plain_view(output)):
        raise ValueError(
            f"output {describe(output)} must be contiguous, and not a conjugated or negated view"
        )
    (start, stop), (first, last) = extent(input), extent(output)
    is_own_part = input.is_contiguous() and start == first + rank * input.nbytes
    if start < last and first < stop and not is_own_part:
        raise ValueError(
            f"input shares memory with output, and peers write there while it is read; pass "
            f"another tensor, or this rank's part of output, "
            f"output[{rank * len(input)}:{(rank + 1) * len(input)}]"
        )


def extent(x: torch.Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte and the one after its last; 0, 0 if empty."""
    if not x.numel():
        return 0, 0
    items = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + items * x.element_size()


def describe(*tensors: torch.Tensor) -> str:
    """Describe shapes, dtypes and devices: `[8, 128] bfloat16`, on a GPU `… bfloat16 cuda`."""
    return " <- ".join(
        f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        + ("" if t.device.type == "cpu" else f" {t.device.type}")
        for t in tensors
    )


# --------------------------------------------------------------- symmetric memory and NCCL


class Segment(Protocol):
    """The part of a segment that is used here: where each rank's memory is in this process."""

    nbytes: int
    addresses: list[int]


class Owner(NamedTuple):
    """The group of a segment, as ranks: a reference to the group would keep its segments alive."""

    rank: int
    ranks: tuple[int, ...]


_owned: dict[int, tuple[int, int, Owner]] = {}  # first address and size of each segment


def register_segment(segment: Segment, rank: int, ranks: tuple[int, ...]) -> None:
    """Record a segment as symmetric memory until it is freed, even after its pool is replaced."""
    _owned[id(segment)] = segment.addresses[rank], segment.nbytes, Owner(rank, ranks)
    weakref.finalize(segment, _owned.pop, id(segment)).atexit = False


def owner_of(x: torch.Tensor) -> Owner | None:
    """Return the owner of the symmetric memory in which a tensor begins; None for other memory."""
    address = x.data_ptr()
    for start, nbytes, owner in [*_owned.values()]:  # a copy: another thread may add segments
        if 0 <= address - start < nbytes:
            return owner
    return None


def ordinary_copy(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor that is in symmetric memory; return any other tensor itself."""
    return x.clone() if owner_of(x) else x


def torch_all_gather(
    output: torch.Tensor,
    input: torch.Tensor,
    group: Members,
    *,
    symmetric_send: bool = False,
    symmetric_recv: bool = False,
) -> None:
    """Gather equal shards of any dtype with the collective of torch.distributed, as bytes.

    CUDA tensors go through NCCL where each rank has its own GPU, otherwise through the host and
    gloo. NCCL then selects its symmetric kernel or an ordinary one. A buffer in symmetric memory is
    passed to NCCL without a copy only if `symmetric_send` or `symmetric_recv` states that all ranks
    agreed to it (`path.unsafe_for_nccl`).
    """
    if output.numel() == 0:
        return
    recv, send = output, input
    if not (_is_plain(output) and _is_plain(input)):
        recv, send = _flat_bytes(output), _flat_bytes(input)
    if recv.device.type == "cpu":
        _all_gather_single(recv, send, group.process_group)
    elif not group.has_nccl:
        host = torch.from_numpy(np.empty(recv.nbytes, dtype=np.uint8))
        host = host.view(recv.dtype).view(recv.shape)
        _all_gather_single(host, send.cpu(), group.process_group)
        recv.copy_(host)
    else:
        send = send if symmetric_send else ordinary_copy(send)
        target = recv if symmetric_recv else ordinary_copy(recv)
        _all_gather_single(target, send, group.process_group)
        if target is not recv:
            recv.copy_(target)


def exchange_over(process_group: dist.ProcessGroup, message: bytes, size: int) -> list[bytes]:
    """Return the messages of all ranks, by rank, for ranks without shared memory.

    Messages have at most MAX_MESSAGE_BYTES and are sent in frames of one fixed size.
    """
    # numpy allocates, because inside `use_symmetric_memory` torch.empty allocates in a pool.
    mine = np.zeros(8 + MAX_MESSAGE_BYTES, dtype=np.uint8)
    data = len(message).to_bytes(8, "little") + message
    mine[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    frames = torch.from_numpy(np.empty(size * len(mine), dtype=np.uint8))
    _all_gather_single(frames, torch.from_numpy(mine), process_group)
    pages = [bytes(page.numpy()) for page in frames.view(size, -1)]
    return [page[8 : 8 + int.from_bytes(page[:8], "little")] for page in pages]


# torch stores and views these dtypes, but has no kernels that copy them or fill their memory.
_BYTE_DTYPES = (
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    *("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"),
)
_CARRIERS = {
    getattr(torch, name): carrier
    for name, carrier in (
        *((name, torch.uint8) for name in _BYTE_DTYPES),
        ("bits16", torch.int16),
        ("bcomplex32", torch.int32),  # new in torch 2.14, which cannot copy an expanded view of it
    )
    if hasattr(torch, name)
}


def copyable(x: torch.Tensor) -> torch.Tensor:
    """View a tensor as integers if torch cannot copy its dtype (int4).

    A lazily conjugated or negated view is copied. The result is of no subclass.
    """
    if type(x) is not torch.Tensor:
        x = plain_class(x)
    values = x.detach().resolve_conj().resolve_neg()
    carrier = _CARRIERS.get(values.dtype)
    return values.view(carrier) if carrier else values


_INTEGERS = (torch.int64, torch.int32, torch.uint8)


def _is_plain(x: torch.Tensor) -> bool:
    """Return True for contiguous integers, which every collective takes as they are."""
    return type(x) is torch.Tensor and x.dtype in _INTEGERS and x.is_contiguous()


def _flat_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return all bytes of a tensor in one dimension: a view of it if it is contiguous."""
    dense = copyable(x).contiguous()
    # A single element counts as contiguous with any stride, but the view below needs stride 1.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


# torch 2.13 renamed the collective and deprecates the old name.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _all_gather_single(
    output: torch.Tensor, input: torch.Tensor, process_group: dist.ProcessGroup
) -> None:
    _GATHER(output, input, group=process_group)
