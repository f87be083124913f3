"""NCCL with a GPU per rank, and a setting that decides its path, on all ranks or on one.

`CPKIT_TEST_NCCL` is empty, or a variable: "NCCL_WIN_ENABLE=0" on all ranks, "NCCL_WIN_ENABLE=0@1"
on rank 1. NCCL reads it when the first group is made. Its log is off, except inside `observe`.
"""

from __future__ import annotations

import os
from functools import partial

from cpkit import provenance
from cpkit.devices import loaded_nccl_version
from cpkit.gather import ALGORITHMS, all_gather_kv, last_path
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.memory.nccl_log import observe
from cpkit.memory.path import copy_engine_fails
from cpkit.symm import explain_path
from tests.ranks.device import path_by_table, world_group
from tests.ranks.windows import (
    DTYPE,
    SHAPE,
    SHARD_ROWS,
    gather,
    in_pool,
    kernels,
    placements,
    stamp,
)

SETTING, _, ONLY_RANK = os.environ.get("CPKIT_TEST_NCCL", "").partition("@")
if SETTING and ONLY_RANK in ("", os.environ["RANK"]):
    os.environ.update([SETTING.split("=")])


def expected() -> tuple[str, str, str]:
    """Return the path of two registered buffers, words of its reason, and NCCL's choice."""
    if not SETTING:
        return path_by_table("padded_symm"), "recv is registered", path_by_table("padded_symm")
    if SETTING == "NCCL_CTA_POLICY=2" and not ONLY_RANK:
        if copy_engine_fails(loaded_nccl_version()):
            return "fallback", "nccl#2003", "fallback"
        return "symmetric", "the copy engine moves the rows", "copy engine"
    if not ONLY_RANK:
        return "fallback", f"all ranks: {SETTING}", "fallback"
    words = {"NCCL_CTA_POLICY=2": "rank(s) 0: default; rank(s) 1: zero"}
    return "fallback", words.get(SETTING, f"rank(s) 0: on; rank(s) 1: {SETTING}"), "fallback"


def check_the_report_has_the_reason_and_the_log_agrees() -> None:
    group = world_group()
    path, words, kind = expected()
    for rows in SHARD_ROWS[:2]:
        send, recv = in_pool(group, rows), in_pool(group, rows * group.size)
        for round in (1, 2):
            stamp(send, group, round)
            report = explain_path(send, recv, group)
            seen = observe(partial(gather, group, send, recv, round))
            assert report.path == path, report
            assert words in report.reason, report
            assert last_path(group) == report
            assert not seen.reason, seen
            if group.rank == 0:
                (selected,) = seen.calls  # none of the other round
                assert selected.kind == kind, selected
                if kind != "copy engine":
                    assert selected.kernel in kernels(kind, rows, group), selected


def check_rows_are_right_under_this_setting() -> None:
    group = world_group()
    rows = SHARD_ROWS[1]
    for round, (_, send, recv, _) in enumerate(placements(group, rows), start=1):
        stamp(send, group, round)
        gather(group, send, recv, round)
    metadata = prepare_context_parallel_metadata([4097, 64], group.size)
    for round, algorithm in enumerate(ALGORITHMS, start=1):
        shard = provenance.shard_rows(metadata, group.rank, SHAPE, DTYPE, round=round).cuda()
        (got,) = all_gather_kv([shard], metadata, group, algorithm=algorithm)
        provenance.check(got, metadata, round=round)
