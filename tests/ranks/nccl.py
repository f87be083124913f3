"""The NCCL path on one GPU: a host id per rank makes NCCL accept two ranks on it."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["NCCL_HOSTID"] = f"cpkit-{os.environ['RANK']}"

import torch

from cpkit import provenance
from cpkit.devices import loaded_nccl_version
from cpkit.gather import ALGORITHMS, all_gather_kv, last_path
from cpkit.layout import STRATEGIES, prepare_context_parallel_metadata
from cpkit.memory.nccl_log import count_file
from cpkit.memory.path import nccl_rule
from cpkit.symm import explain_path, use_symmetric_memory
from tests.ranks.device import world_group


def check_every_algorithm_is_bit_exact() -> None:
    group = world_group()
    assert group.has_nccl
    for round, strategy in enumerate(STRATEGIES):
        metadata = prepare_context_parallel_metadata([97, 64], group.size, strategy)
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool):
            rows = provenance.shard_rows(metadata, group.rank, (4, 8), dtype, round=round).cuda()
            for algorithm in ALGORITHMS:
                (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
                provenance.check(got, metadata, round=round)


def check_the_path_is_that_of_this_nccls_version() -> None:
    group = world_group()
    with use_symmetric_memory(group):
        recv = torch.empty(4 * group.size, 4, device="cuda")
    send = torch.ones(4, 4, device="cuda")
    version = loaded_nccl_version()
    report = explain_path(send, recv, group)
    by_table = explain_path(send, recv, group, "nccl " + ".".join(map(str, version)))
    assert by_table.path == ("symmetric" if nccl_rule(version) == "recv" else "fallback")
    assert report.path == "fallback"
    both = explain_path(recv[:4], recv, group)
    assert both.path == "fallback"
    assert "ranks share a GPU" in both.reason
    metadata = prepare_context_parallel_metadata([97, 64], group.size)
    rows = provenance.shard_rows(metadata, group.rank, (8,), torch.float32, round=1).cuda()
    all_gather_kv([rows], metadata, group, algorithm="padded_symm_recv")
    assert last_path(group).path == "fallback"


def check_the_log_counts_what_nccl_selected() -> None:
    """Over sockets NCCL has no symmetric kernels, as its log shows."""
    group = world_group()
    if group.rank == 0:
        log = Path(os.environ["NCCL_DEBUG_FILE"].removesuffix(".%p"))
        before = count_file(log)
    send, recv = torch.ones(4, 4, device="cuda"), torch.empty(8, 4, device="cuda")
    for _ in range(5):
        group.cp_all_gather_into_tensor_async(recv, send)
    torch.cuda.synchronize()
    if group.rank == 0:
        after = count_file(log)
        assert after.fallback - before.fallback == 5, (before, after)
        assert after.symmetric == 0
