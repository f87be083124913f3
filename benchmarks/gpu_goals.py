"""The goals on the GPU, and whether they were reached. A ratio compares times of one run. Pure."""

from __future__ import annotations

from typing import Any

from benchmarks.goals import MB, Record, Times, entry, times_us

SEED, LOW_CONTENTION = "seed", "low-contention"


def goals_of(rows: list[dict[str, Any]]) -> list[Record]:
    """Return one entry per goal: the worst ratio over all its sizes, and the limit."""
    floors = {(r["cp_size"], r["size_bytes"]): r["floor_us"] for r in rows if r["floor_us"]}
    times = times_us(rows)
    found: list[Record] = []
    for name in ("direct", "plan"):
        to_floor = {key: us[name] / floors[key] for key, us in times.items() if key in floors}
        large = {k: v for k, v in to_floor.items() if k[1] >= 256 * MB}
        middle = {k: v for k, v in to_floor.items() if 64 * MB <= k[1] < 256 * MB}
        found += entry(f"{name} / floor, 256 MB and more", large, 1.10, max)
        found += entry(f"{name} / floor, 64 to 256 MB", middle, 1.25, max)
        for form in ("", " graph"):
            found += against_seed(times, name, f"{SEED}{form}")
            torchs = ratios(times, f"{LOW_CONTENTION}{form}", name)
            found += entry(f"{LOW_CONTENTION}{form} / {name}, every size", torchs, 4.5, min)
    graphs = {k: us["graph"] for k, us in times.items() if k[0] == 2 and "graph" in us}
    smallest = {k: v for k, v in graphs.items() if k[1] == min(size for _, size in graphs)}
    return found + entry("graph at cp_size 2, smallest size (us)", smallest, 12, max)


def against_seed(times: Times, name: str, seed: str) -> list[Record]:
    """Return two goals: one for eight ranks and one for fewer."""
    large = {k: v for k, v in ratios(times, seed, name).items() if k[1] >= 16 * MB}
    at_8 = {k: v for k, v in large.items() if k[0] == 8}
    below_8 = {k: v for k, v in large.items() if k[0] < 8}
    return [
        *entry(f"{seed} / {name}, 16 MB and more, cp_size 8", at_8, 4.5, min),
        *entry(f"{seed} / {name}, 16 MB and more, cp_size 2 and 4", below_8, 4, min),
    ]


def ratios(times: Times, opponent: str, name: str) -> dict[tuple[int, int], float]:
    """Return the competitor's time as a multiple of ours, where both were measured."""
    return {k: us[opponent] / us[name] for k, us in times.items() if opponent in us}


def opponent_us(us: dict[str, float], name: str) -> float:
    """Return the competitor's eager time, or its time in a graph if that is faster."""
    return min(us[name], us.get(f"{name} graph", us[name]))
