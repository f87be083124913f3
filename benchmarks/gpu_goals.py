"""What was to be reached on the GPU, and what was. Ratios are of one run. Pure."""

from __future__ import annotations

from typing import Any

from benchmarks.goals import MB, Record, entry, times_us

SEED, LOW_CONTENTION = "seed", "low-contention"


def goals_of(rows: list[dict[str, Any]]) -> list[Record]:
    """One entry a goal: the worst ratio of all its sizes, and the limit."""
    floors = {(r["cp_size"], r["size_bytes"]): r["floor_us"] for r in rows if r["floor_us"]}
    times = times_us(rows)
    found: list[Record] = []
    for name in ("direct", "plan"):
        to_floor = {key: us[name] / floors[key] for key, us in times.items() if key in floors}
        large = {k: v for k, v in to_floor.items() if k[1] >= 256 * MB}
        middle = {k: v for k, v in to_floor.items() if 64 * MB <= k[1] < 256 * MB}
        found += entry(f"{name} / floor, 256 MB and more", large, 1.10, max)
        found += entry(f"{name} / floor, 64 to 256 MB", middle, 1.25, max)
        seed = {k: opponent_us(us, SEED) / us[name] for k, us in times.items() if k[1] >= 16 * MB}
        at_8 = {k: v for k, v in seed.items() if k[0] == 8}
        below_8 = {k: v for k, v in seed.items() if k[0] < 8}
        found += entry(f"seed / {name}, 16 MB and more, cp_size 8", at_8, 4.5, min)
        found += entry(f"seed / {name}, 16 MB and more, cp_size 2 and 4", below_8, 4, min)
        torchs = {k: opponent_us(us, LOW_CONTENTION) / us[name] for k, us in times.items()}
        found += entry(f"low-contention / {name}, every size", torchs, 4.5, min)
    graphs = {k: us["graph"] for k, us in times.items() if k[0] == 2 and "graph" in us}
    smallest = {k: v for k, v in graphs.items() if k[1] == min(size for _, size in graphs)}
    return found + entry("graph at cp_size 2, smallest size (us)", smallest, 12, max)


def opponent_us(us: dict[str, float], name: str) -> float:
    """An opponent's time: eager, or captured in a graph where that is faster."""
    return min(us[name], us.get(f"{name} graph", us[name]))
