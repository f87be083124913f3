"""Turn samples into rows: one row per variant and size, in nccl-tests' columns. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cpkit.cost import PASSES, traffic
from cpkit.timing import algbw_gbps, busbw_gbps, percentile

Samples = Sequence[Sequence[float]]  # µs, [rank][iteration]
ROW_BYTES = 8 * 128 * 2
PLANNED = {
    "plan": "direct",
    "seed": "padded",
    "seed recv": "padded_symm_recv",
    "seed both": "padded_symm",
}


def summarize(rounds: Sequence[Samples]) -> dict[str, Any]:
    """Return the figures of one variant over several rounds.

    time_us is the median over rounds of the slowest rank's median. spread_pct is the spread between
    rounds, skew_us the difference between ranks.
    """
    medians = [[statistics.median(rank) for rank in ranks] for ranks in rounds]
    slowest = [max(ranks) for ranks in medians]
    time_us = statistics.median(slowest)
    return {
        "time_us": time_us,
        "p95_us": statistics.median([max(percentile(r, 95) for r in ranks) for ranks in rounds]),
        "min_us": min(max(min(rank) for rank in ranks) for ranks in rounds),
        "skew_us": statistics.median([max(ranks) - min(ranks) for ranks in medians]),
        "spread_pct": 100 * (max(slowest) - min(slowest)) / time_us,
        "rounds_us": slowest,
        "iterations": min(len(rank) for ranks in rounds for rank in ranks),
        "rounds": len(rounds),
    }


def row(
    variant: str,
    cp_size: int,
    tokens: int,
    padded_bytes: int,
    rounds: Sequence[Samples],
    row_bytes: int = ROW_BYTES,
) -> dict[str, Any]:
    """Return one row of the table."""
    total_bytes = tokens * row_bytes
    figures = summarize(rounds)
    return {
        "variant": variant,
        "cp_size": cp_size,
        "tokens": tokens,
        "size_bytes": total_bytes,
        "count": total_bytes // 2,
        "type": "bfloat16",
        **figures,
        "algbw_gbps": algbw_gbps(total_bytes, figures["time_us"]),
        "busbw_gbps": busbw_gbps(total_bytes, figures["time_us"], cp_size),
        "moved_bytes": moved_bytes(variant, total_bytes, cp_size, padded_bytes),
        "passes": passes(variant),
        "wrong": 0,  # a wrong result ends the benchmark
    }


def moved_bytes(variant: str, total_bytes: int, cp_size: int, padded_bytes: int) -> int | None:
    """Return the bytes read plus written by all ranks; None if that is internal to a library."""
    algorithm = PLANNED.get(variant, variant)
    if algorithm in PASSES:
        return traffic(algorithm, total_bytes, cp_size, padded_bytes).moved_bytes
    if variant == "gloo alone":
        return traffic("padded", total_bytes, cp_size, padded_bytes).wire_bytes
    return 2 * cp_size * total_bytes if variant in ("memcpy", "copy") else None


def passes(variant: str) -> int:
    """Return the number of passes over the data; competitors without a pipeline make one."""
    return len(PASSES.get(PLANNED.get(variant, variant), ("wire",)))


def rows_of(
    cp_size: int, ours: Sequence[list[dict[str, Any]]], theirs: Sequence[list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (gather rows, barrier rows) of all rounds at one cp_size."""
    found = _by_size(ours)
    gathers, barriers = [], []
    for tokens, (padded_bytes, variants) in found.items():
        alien = [
            size["samples_us"] for launch in theirs for size in launch if size["tokens"] == tokens
        ]
        named = variants | ({"Open MPI": alien} if alien else {})
        for name, rounds in named.items():
            if tokens:
                gathers.append(row(name, cp_size, tokens, padded_bytes, rounds))
            else:
                who = "Open MPI" if name == "Open MPI" else "cpkit"
                barriers.append({"who": who, "cp_size": cp_size, **summarize(rounds)})
    return gathers, barriers


def _by_size(
    launches: Iterable[list[dict[str, Any]]],
) -> dict[int, tuple[int, dict[str, list[Samples]]]]:
    """Return the samples of all rounds by tokens and variant."""
    found: dict[int, tuple[int, dict[str, list[Samples]]]] = {}
    for launch in launches:
        for size in launch:
            _, variants = found.setdefault(size["tokens"], (size.get("padded_bytes", 0), {}))
            for name, timed in size["variants"].items():
                variants.setdefault(name, []).append(timed["samples_us"])
    return found
