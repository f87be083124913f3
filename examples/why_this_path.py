"""Show which path a gather takes, per transport and NCCL version, and why.

    torchrun --standalone --nproc-per-node 4 examples/why_this_path.py [--device cuda]

SGLang's #24040 placed the receive buffer of its gather in symmetric memory. #37337 found that NCCL
2.28 still used its ring algorithm, because the shard that is sent is in ordinary memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cpkit.devices import use_local_gpu
from cpkit.gather import all_gather_kv, last_path
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import prepare_context_parallel_metadata, shard
from cpkit.symm import PathReport, explain_path, is_allocation_symmetric, use_symmetric_memory

ROWS, SHAPE = 64, (8, 128)
TRANSPORTS = (None, "nccl 2.27.7", "nccl 2.28.9", "nccl 2.29.2", "nccl 2.30.7")


def main() -> None:
    """Print all cases on rank 0. Collective, because a path depends on the buffers of all ranks."""
    parser = argparse.ArgumentParser(description="Show which path a gather takes, and why.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    if device == "cuda":
        use_local_gpu()
    dist.init_process_group("gloo")
    group = init_context_parallel(dist.get_world_size())
    for title, lines in (
        ("The seed as merged (#24040): the receive buffer is symmetric", seed(group, device)),
        ("Both buffers symmetric (#37337's remedy)", both(group, device)),
        ("A receive buffer of another group's pool (#19329)", foreign(group, device)),
        ("Receive buffers at different offsets (pytorch#178138)", shifted(group, device)),
        ("What this machine's gathers do", gathers(group, device)),
    ):
        reports = list(lines)  # collective, so every rank evaluates it
        if group.rank == 0:
            print(f"\n{title}")
            for name, report in reports:
                print(f"  {name:18} {report.path:9}  {report.reason}")
    dist.destroy_process_group()


def per_transport(
    send: torch.Tensor, recv: torch.Tensor, group: CPGroup
) -> Iterator[tuple[str, PathReport]]:
    """Yield one report per transport; None is the transport that this group uses."""
    for transport in TRANSPORTS:
        yield transport or "here", explain_path(send, recv, group, transport)


def seed(group: CPGroup, device: str) -> Iterator[tuple[str, PathReport]]:
    """Allocate the buffers as `cp_all_gather_reorganized_into_tensor_kv_cache` does."""
    send = torch.zeros(ROWS, *SHAPE, device=device)
    with use_symmetric_memory(group, disabled=not is_allocation_symmetric()):
        recv = torch.empty(ROWS * group.size, *SHAPE, device=device)
    return per_transport(send, recv, group)


def both(group: CPGroup, device: str) -> Iterator[tuple[str, PathReport]]:
    """Allocate both buffers in the group's pool."""
    with use_symmetric_memory(group):
        send, recv = (
            torch.empty(ROWS, *SHAPE, device=device),
            torch.empty(ROWS * group.size, *SHAPE, device=device),
        )
    return per_transport(send, recv, group)


def foreign(group: CPGroup, device: str) -> Iterator[tuple[str, PathReport]]:
    """Allocate both buffers in the pool of another group, of one rank."""
    alone = init_context_parallel(1)
    with use_symmetric_memory(alone):
        send, recv = (
            torch.empty(ROWS, *SHAPE, device=device),
            torch.empty(ROWS * group.size, *SHAPE, device=device),
        )
    init_context_parallel(group.size)
    return per_transport(send, recv, group)


def shifted(group: CPGroup, device: str) -> Iterator[tuple[str, PathReport]]:
    """Use views that begin one row later on rank 0, so their offsets in the pool differ."""
    first = int(group.rank == 0)
    with use_symmetric_memory(group):
        send = torch.empty(ROWS + 1, *SHAPE, device=device)[first : first + ROWS]
        recv = torch.empty(ROWS * group.size + 1, *SHAPE, device=device)[
            first : first + ROWS * group.size
        ]
    return per_transport(send, recv, group)


def gathers(group: CPGroup, device: str) -> Iterator[tuple[str, PathReport]]:
    """Run each algorithm and report the path that it took."""
    metadata = prepare_context_parallel_metadata([ROWS * group.size + 1], group.size)
    mine = shard(torch.zeros(metadata.total_tokens, *SHAPE, device=device), metadata, group.rank)
    for algorithm in ("padded", "padded_symm_recv", "padded_symm", "direct"):
        all_gather_kv([mine], metadata, group, algorithm=algorithm)
        report = last_path(group)
        assert report is not None
        yield algorithm, report


if __name__ == "__main__":
    main()
