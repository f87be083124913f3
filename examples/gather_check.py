"""Check every algorithm and strategy bit for bit on random ragged batches, in a torchrun job.

    torchrun --standalone --nproc-per-node 4 examples/gather_check.py

This is also the shortest example of the library without workers and notebooks: initialize a process
group, split it into context-parallel groups, describe the batch, gather.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from cpkit.gather import (
    ALGORITHMS,
    all_gather_kv,
    cp_all_gather_reorganized_into_tensor_kv_cache,
    cp_all_gather_rerange_kv_cache,
)
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata, shard
from cpkit.symm import explain_path, is_allocation_symmetric, use_symmetric_memory

STRATEGIES = ("zigzag", "interleave", "contiguous")
DTYPES = (torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.bool)
TRAILING_SHAPES = ((8, 16), (1, 5), (24,), ())


@dataclass(frozen=True)
class Batch:
    """A random batch, equal on all ranks: its layout, and three tensors in token order."""

    metadata: ContextParallelMetadata
    tensors: list[torch.Tensor]

    def shards(self, rank: int) -> list[torch.Tensor]:
        """Return the rows that `rank` holds of each tensor. The last shard is strided."""
        *plain, last = (shard(x, self.metadata, rank) for x in self.tensors)
        wide = last.new_empty(last.shape[0], 2, *last.shape[1:])
        wide[:, 0] = last
        return [*plain, wide[:, 0]]


def main() -> int:
    """Run all checks; return 1 if a rank found a wrong bit."""
    parser = argparse.ArgumentParser(description="Check cpkit's gathers bit for bit.")
    parser.add_argument("--batches", type=int, default=4, help="batches per cp_size and strategy")
    parser.add_argument("--max-tokens", type=int, default=300, help="longest sequence of a batch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checked = wrong = 0
    for cp_size in (n for n in range(1, world_size + 1) if world_size % n == 0):
        group = init_context_parallel(cp_size)
        for strategy in STRATEGIES:
            for number in range(options.batches):
                # One seed for all ranks, so that each rank can compute the expected result.
                rng = random.Random(f"{options.seed} {cp_size} {strategy} {number}")
                batch = random_batch(rng, cp_size, strategy, options.max_tokens)
                for what, want, got in gathers(batch, group):
                    checked += 1
                    if not same_bits(want, got):
                        wrong += 1
                        print(f"rank {rank}, cp {cp_size}: {what} is WRONG", file=sys.stderr)
    total_wrong = torch.tensor(wrong)
    dist.all_reduce(total_wrong)
    if rank == 0:
        result = f"{total_wrong} WRONG" if total_wrong else "all bit-exact"
        print(f"{checked} gathered tensors on each of {world_size} ranks: {result}")
    dist.destroy_process_group()
    return int(total_wrong > 0)


def gathers(batch: Batch, group: CPGroup) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Gather the batch in every way; yield (description, expected tensor, gathered tensor)."""
    metadata = batch.metadata
    name = f"{metadata.strategy} of {list(metadata.lengths)} tokens by "
    for algorithm in ALGORITHMS:
        whole = all_gather_kv(batch.shards(group.rank), metadata, group, algorithm=algorithm)
        for want, got in zip(batch.tensors, whole, strict=True):
            yield name + algorithm, want, got
    for want, mine in zip(batch.tensors, batch.shards(group.rank), strict=True):
        in_rank_order = [shard(want, metadata, rank) for rank in range(group.size)]
        got = like_sglang(cp_all_gather_reorganized_into_tensor_kv_cache, mine, metadata)
        yield name + "cp_all_gather_reorganized_...", torch.cat(in_rank_order), got
        got = like_sglang(cp_all_gather_rerange_kv_cache, mine, metadata)
        yield name + "cp_all_gather_rerange_kv_cache", want, got
    yield bare_collective(group)


def like_sglang(
    function: Callable[..., torch.Tensor], mine: torch.Tensor, metadata: ContextParallelMetadata
) -> torch.Tensor:
    """Call one of SGLang's two functions as SGLang does.

    `total_len` must have room for `cp_size` times the rows of the rank with the most. With several
    sequences that can be more than the number of tokens.
    """
    forward_batch = SimpleNamespace(attn_cp_metadata=metadata)
    total_len = metadata.max_rank_len[0] * metadata.cp_size
    return function(mine, total_len, metadata.cp_size, forward_batch, None)


def bare_collective(group: CPGroup) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Gather one row per rank between symmetric buffers, and explain the path."""
    with use_symmetric_memory(group, disabled=not is_allocation_symmetric()):
        send = torch.full((1, 16), group.rank, dtype=torch.int64)
        recv = torch.empty(group.size, 16, dtype=torch.int64)
    report = explain_path(send, recv, group)
    group.cp_all_gather_into_tensor_async(recv, send)
    want = torch.arange(group.size)[:, None].expand(group.size, 16)
    return f"collective by path {report.path!r} ({report.reason})", want, recv


def random_batch(rng: random.Random, cp_size: int, strategy: str, max_tokens: int) -> Batch:
    """Make three tensors of one to five sequences, with lengths that the strategy allows."""
    shortest = 2 * cp_size if strategy == "zigzag" else 1
    lengths = [rng.randint(shortest, max(shortest, max_tokens)) for _ in range(rng.randint(1, 5))]
    metadata = prepare_context_parallel_metadata(lengths, cp_size, strategy)
    dtype = rng.choice(DTYPES)
    shapes = [(metadata.total_tokens, *rng.choice(TRAILING_SHAPES)) for _ in range(3)]
    return Batch(metadata, [random_tensor(rng, shape, dtype) for shape in shapes])


def random_tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return random bytes as `dtype`, NaNs included (a bool has only two bit patterns)."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    data = torch.frombuffer(bytearray(rng.randbytes(n_bytes)), dtype=torch.uint8)
    return (data & 1 if dtype == torch.bool else data).view(dtype).view(shape)


def same_bits(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Return True if shape, dtype and bytes are equal. NaNs compare by their bits."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    return torch.equal(*(x.contiguous().view(torch.uint8) for x in (want, got)))


if __name__ == "__main__":
    sys.exit(main())
