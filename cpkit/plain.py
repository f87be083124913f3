"""torch.distributed without symmetric memory: the collective, and an exchange of notes."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from cpkit.board import NOTE_BYTES
from cpkit.devices import device_problem, stores_as_shown


class Members(Protocol):
    """What of a group is needed here."""

    process_group: dist.ProcessGroup
    has_nccl: bool


def gather_problem(output: torch.Tensor, input: torch.Tensor, size: int) -> str:
    """Why `output` can't take `size` shards like `input`; empty when it can."""
    for name, x in (("output", output), ("input", input)):
        if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
            return f"{name} is {type(x).__name__}; it must be an ordinary strided tensor"
        problem = device_problem(name, x)
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


def plain_all_gather(output: torch.Tensor, input: torch.Tensor, group: Members) -> None:
    """The collective of torch.distributed, on bytes: not every dtype is known to every backend.

    CUDA tensors go through NCCL where each rank has a GPU of its own, else over the host and gloo.
    """
    if output.numel() == 0:
        return
    out, shard = (flat_bytes(t) for t in (output, input))
    if out.device.type == "cpu" or group.has_nccl:
        _all_gather_single(out, shard, group.process_group)
        return
    host = torch.empty(out.shape, dtype=out.dtype, device="cpu")
    _all_gather_single(host, shard.cpu(), group.process_group)
    out.copy_(host)


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
