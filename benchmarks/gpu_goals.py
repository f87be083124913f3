"""The goals on the GPU, and whether they were reached. A ratio compares times of one run. Pure."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.goals import MB, Record, Times, entry, times_us

SEED, LOW_CONTENTION = "seed", "low-contention"
NCCL = ("NCCL", "NCCL recv", "NCCL both")
PIPELINES = {"padded": "seed", "padded_symm_recv": "seed recv", "padded_symm": "seed both"}
AT_MB = {"0.26": (0, 0.9), "1 to 4": (0.9, 10), "16": (10, 40), "67": (40, 100), "268": (100, 1e9)}
Ratios = dict[tuple[int, int], float]


def goals_of(record: Record) -> list[Record]:
    """Return one entry per goal: the worst ratio over all its sizes, and the limit."""
    rows = record["gather"]
    times = times_us(rows)
    floors = {(r["cp_size"], r["size_bytes"]): r["floor_us"] for r in rows}
    to_floor = {key: us["plan"] / floors[key] for key, us in times.items()}
    if record["sharing"]:
        return _goals_on_a_shared_gpu(times, to_floor)
    call, host = (times_us(rows, clock) for clock in ("call_us", "host_us"))
    seed = ratios(times, SEED, "plan")
    alone = {key: best_us(us, NCCL) / us["plan"] for key, us in times.items()}
    calls = ratios(call, "direct", SEED)
    first = min(times)
    found = [
        *_at("0.26", "seed / plan", seed, 1.6, min),
        *_at("1 to 4", "seed / plan", seed, 2.2, min),
        *_at("16", "seed / plan", seed, 2.8, min),
        *_at("67", "seed / plan", seed, 2.8, min),
        *_at("268", "seed / plan", seed, 2.8, min),
        *_at("0.26", "best NCCL alone / plan", alone, 1.2, min),
        *_at("1 to 4", "best NCCL alone / plan", alone, 1.2, min),
        *_at("16", "best NCCL alone / plan", alone, 1.5, min),
        *_at("67", "best NCCL alone / plan", alone, 1.5, min),
        *_at("268", "best NCCL alone / plan", alone, 1.5, min),
        *_at("67", "plan / floor", to_floor, 1.10, max),
        *_at("268", "plan / floor", to_floor, 1.05, max),
        *entry("plan, smallest size (us)", {first: times[first]["plan"]}, 7, max),
    ]
    for size, limit in (("0.26", 0.6), ("1 to 4", 0.6), ("16", 0.6), ("67", 0.6), ("268", 0.45)):
        found += _at(size, "call time, direct / seed", calls, limit, max)
    found += entry("host time of direct (us)", {first: host[first]["direct"]}, 60, max)
    for ours, theirs in PIPELINES.items():
        extra = {first: host[first][ours] - host[first][theirs]}
        found += entry(f"host time of {ours} above {theirs} (us)", extra, 40, max)
    return found


def _goals_on_a_shared_gpu(times: Times, to_floor: Ratios) -> list[Record]:
    large = {key: ratio for key, ratio in ratios(times, SEED, "plan").items() if key[1] >= 15 * MB}
    torchs = ratios(times, LOW_CONTENTION, "plan")
    return [
        *_at("268", "plan / floor", to_floor, 1.10, max),
        *_at("67", "plan / floor", to_floor, 1.25, max),
        *entry("seed / plan, 16 MB and more", large, 4, min),
        *entry("low-contention / plan, every size", torchs, 4.5, min),
    ]


def _at(
    size: str, name: str, values: Ratios, limit: float, worst: Callable[..., float]
) -> list[Record]:
    low, high = AT_MB[size]
    chosen = {key: value for key, value in values.items() if low * MB <= key[1] < high * MB}
    return entry(f"{name}, {size} MB", chosen, limit, worst)


def ratios(times: Times, above: str, below: str) -> Ratios:
    """Return the quotient of two variants' times at each size, where both were measured."""
    return {k: us[above] / us[below] for k, us in times.items() if {above, below} <= us.keys()}


def best_us(us: dict[str, float], names: tuple[str, ...]) -> float:
    """Return the shortest of these variants' times."""
    return min(us[name] for name in names if name in us)
