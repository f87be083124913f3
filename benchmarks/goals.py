"""The goals on the CPU, and whether they were reached. A ratio compares times of one run. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Times = dict[tuple[int, int], dict[str, float]]
MB = 1e6


def goals_of(record: Record) -> list[Record]:
    """Return one entry per goal: the worst ratio over all its sizes, and the limit."""
    times = times_us(record["gather"])
    small, large = (0.4 * MB, 5 * MB), (30 * MB, 140 * MB)
    found = [
        *_against(times, "Open MPI", (2, 4), small, 0.80),
        *_against(times, "Open MPI", (2, 4), large, 0.97),
        *_against(times, "Open MPI", (8,), (0, 140 * MB), 1.0),
        *_against(times, "memcpy", (2, 4), large, 1.05),
    ]
    for variant in ("plan", "direct"):
        ratios = {
            key: us["padded"] / us[variant]
            for key, us in times.items()
            if key[1] >= 4 * MB and variant in us and "padded" in us
        }
        found += entry(f"padded over gloo / {variant}, 4 MB and more", ratios, 12, min)
    for cp_size, limit_us in ((2, 3), (4, 12), (8, 40)):
        ours = {
            (each["cp_size"], 0): each["time_us"]
            for each in record["barrier"]
            if each["cp_size"] == cp_size and each["who"] == "cpkit"
        }
        found += entry(f"barrier of {cp_size} ranks (us)", ours, limit_us, max)
    for row in record.get("control", {}).get("rows", []):
        name, value = f"{row['what']} ({row['unit']})", {(0, 0): row["p50"]}
        found += entry(name, value, row["goal"], max, strict=row.get("below", False))
    return found + _cost_goals(record.get("cost"))


def _against(
    times: Times, opponent: str, cp_sizes: tuple[int, ...], sizes: tuple[float, float], limit: float
) -> list[Record]:
    """Return the ratios of `plan` and `direct` to a competitor."""
    entries = []
    who = f"cp_size {' and '.join(map(str, cp_sizes))}"
    what = f"{who}, {sizes[0] / MB:.3g} to {sizes[1] / MB:.3g} MB"
    for variant in ("plan", "direct"):
        ratios = {
            key: us[variant] / us[opponent]
            for key, us in times.items()
            if key[0] in cp_sizes
            and sizes[0] <= key[1] <= sizes[1]
            and {variant, opponent} <= us.keys()
        }
        entries += entry(f"{variant} / {opponent}, {what}", ratios, limit, max)
    return entries


def entry(
    name: str,
    values: dict[tuple[int, int], float],
    limit: float,
    worst: Callable[..., float],
    *,
    strict: bool = False,
) -> list[Record]:
    """Return the entry of a goal, or no entry if the run did not measure it.

    `strict`: a value equal to the limit misses the goal.
    """
    if not values:
        return []
    reached = worst(values.values())
    best = (min if worst is max else max)(values.values())
    met = reached <= limit if worst is max else reached >= limit
    met = met and not (strict and reached == limit)
    sign = ("below" if strict else "at most") if worst is max else "at least"
    return [{"goal": f"{name}: {sign} {limit:g}", "worst": reached, "best": best, "met": met}]


def _cost_goals(cost: Record | None) -> list[Record]:
    if not cost:
        return []
    return [
        *entry("cost model, median error (%)", {(0, 0): cost["median_error_pct"]}, 15, max),
        *entry("cost model, worst error (%)", {(0, 0): cost["worst_error_pct"]}, 35, max),
    ]


def times_us(rows: list[Record], column: str = "time_us") -> Times:
    """Return the median time of each variant by (cp_size, size_bytes)."""
    found: Times = {}
    for row in rows:
        found.setdefault((row["cp_size"], row["size_bytes"]), {})[row["variant"]] = row[column]
    return found
