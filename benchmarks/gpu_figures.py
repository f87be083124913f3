"""A record of `make bench-gpu` as text, for the terminal and the pages. Pure.

A record has two GPUs, more GPUs, or ranks that share one. Each kind has its own place in the pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    GOAL_COLUMNS,
    SIZE_COLUMNS,
    TIME_COLUMNS,
    Ratios,
    Times,
    cell,
    quotients,
    sourced,
    table,
    table_of,
    time_table,
    write_pages,
)
from benchmarks.goals import times_us
from benchmarks.gpu_goals import NCCL, best_us

Record = dict[str, Any]
SEEDS = ("seed", "seed recv", "seed both")
DEVICE_VARIANTS = (
    *("plan", "direct", "padded", "padded_symm_recv", "padded_symm"),
    *SEEDS,
    *NCCL,
    *("copy engine", "low-contention", "floor"),
)
CALL_VARIANTS = ("plan", "direct", "padded", "padded_symm_recv", "padded_symm", *SEEDS)
RATIOS: Ratios = (
    ("seed / plan", "seed", "plan"),
    ("seed both / plan", "seed both", "plan"),
    ("best NCCL alone / plan", "best NCCL", "plan"),
    ("plan / floor", "plan", "floor"),
)
SHARED_RATIOS: Ratios = (
    ("seed / plan", "seed", "plan"),
    ("low-contention / plan", "low-contention", "plan"),
    ("plan / floor", "plan", "floor"),
)
COLUMNS = (*SIZE_COLUMNS, *TIME_COLUMNS, ("call_us", "call (us)"), ("host_us", "host (us)"))
BESIDE_COLUMNS = (
    *SIZE_COLUMNS,
    ("variant", "variant"),
    ("time_us", "alone (us)"),
    ("beside_us", "beside a product (us)"),
    ("delay_us", "delays the product by (us)"),
)
NOT_BESIDE = ("copy", "peer copies")


def as_text(record: Record) -> str:
    """Return all figures as Markdown, with the shortest and most important tables last."""
    missing = [f"not measured, {at}: {why}" for at, why in record["missing"].items()]
    return "\n\n".join([table_of(record["gather"], COLUMNS), *missing, as_details(record)])


def conditions(record: Record) -> str:
    """Describe where, when and how the figures were measured."""
    where = record["environment"]
    nccl = "" if record["sharing"] else f"NCCL {where['nccl']} (multicast {where['multicast']}), "
    floor = (
        "(cp + 1) · size at the device's own copy rate in the same run"
        if record["sharing"]
        else "copies of each rank's shard to every peer, by the copy engine in the same run"
    )
    opponents = (
        "NCCL refuses two ranks on one GPU, so `seed` makes the same calls as `copy engine`."
        if record["sharing"]
        else "`seed` is pad, collective, strip and reorder in plain torch, with no symmetric "
        "buffer, the receive buffer (`recv`) or `both`; `NCCL` is the collective alone."
    )
    return (
        f"{where['date']}, {where['device']}, driver {where['driver']}, CUDA {where['cuda']}, "
        f"{nccl}torch {where['torch']}, commit {where['commit']}, `{where['command']}`; clocks of "
        f"a GPU's multiprocessors {_clocks(where)}. One zigzag sequence of bfloat16 rows [8, 128], "
        "each size 3 tokens short of a round number. Device time is that of a CUDA graph of "
        "several calls, divided by their number; each figure is the slowest rank's median in a "
        f"round, and then the median of {record['plan']['rounds']} rounds. Each call reads the "
        "same rows, so what fits into the L2 cache is read from there. `plan` is the prepared call "
        f"of `direct`. {opponents} `copy engine` copies each shard into the peers' symmetric "
        "buffers, then strips and reorders; `low-contention` does so with torch's "
        f"`_low_contention_all_gather`. The floor is {floor}."
    )


def _clocks(environment: Record) -> str:
    """Describe the clocks, recorded as "now, highest" of each GPU, before and after."""
    before, after = environment["clocks_before"], environment["clocks_after"]
    highest = before.split("; ")[0].split(", ")[-1]
    now = [", ".join(each.split(", ")[0] for each in text.split("; ")) for text in (before, after)]
    return f"{now[0]} before and {now[1]} after, of at most {highest}"


def as_summary(record: Record) -> str:
    """Return the ratios, one line per size, and the seed's own batch, for README.md."""
    where = record["environment"]
    words = (
        f"{where['date']}, {where['device']}, NCCL {where['nccl']}, torch {where['torch']}, "
        f"commit {where['commit']}, `{where['command']}`."
    )
    device, call = all_times(record), times_us(record["gather"], "call_us")
    calls: Ratios = (("call time, direct / seed", "direct", "seed"),)
    lines = [
        [
            *(str(cp_size), cell(nbytes / 1e6), cell(us["plan"]), *quotients(us, RATIOS)),
            *quotients(call[cp_size, nbytes], calls),
        ]
        for (cp_size, nbytes), us in device.items()
    ]
    header = ["cp_size", "size (MB)", "plan (us)", *(name for name, *_ in RATIOS), calls[0][0]]
    return f"{words}\n\n{table(header, lines)}"


def as_details(record: Record) -> str:
    """Return all tables for docs/performance.md: device time, call time, overlap, goals."""
    ratios = SHARED_RATIOS if record["sharing"] else RATIOS
    device = measured(all_times(record), DEVICE_VARIANTS)
    parts = [conditions(record), "Device time:", time_table(*device, ratios)]
    if not record["sharing"]:
        call = measured(times_us(record["gather"], "call_us"), CALL_VARIANTS)
        host = measured(times_us(record["gather"], "host_us"), CALL_VARIANTS)
        parts += ["Call time:", time_table(*call, (("direct / seed", "direct", "seed"),))]
        parts += ["Host time, until the call returns:", time_table(*host, ())]
        beside = [each for each in record["beside"] if each["variant"] not in NOT_BESIDE]
        parts += ["Beside a matrix product on another stream:", table_of(beside, BESIDE_COLUMNS)]
    headline = measured(all_times(record, "headline"), DEVICE_VARIANTS)
    parts += [
        "The batch of SGLang #17756, 16,384 rows (index keys) of 128 bytes:",
        time_table(*headline, ratios),
    ]
    return "\n\n".join([*parts, table_of(record["goals"], GOAL_COLUMNS)])


def all_times(record: Record, part: str = "gather") -> Times:
    """Return the device times of every size, with the floor and the best of NCCL's."""
    floors = {(r["cp_size"], r["size_bytes"]): r["floor_us"] for r in record[part]}
    found: dict[tuple[int, int], dict[str, float]] = {}
    for key, us in times_us(record[part]).items():
        found[key] = us | {"floor": floors[key]}
        if not record["sharing"]:
            found[key]["best NCCL"] = best_us(us, NCCL)
    return found


def measured(times: Times, variants: Sequence[str]) -> tuple[Times, list[str]]:
    """Return the times, and those of the variants that were measured at some size."""
    return times, [name for name in variants if any(name in us for us in times.values())]


def fill_pages(root: Path, record_path: Path) -> None:
    """Write the figures of a record between the markers of each page."""
    record = json.loads(record_path.read_text())
    write_pages(root, markers(record), pages(record, record_path.name))


def kind_of(record: Record) -> str:
    """Return the kind of a record: gpu (two GPUs), gpu-4, gpu-8, …, or gpu-shared."""
    if record["sharing"]:
        return "gpu-shared"
    largest = max(row["cp_size"] for row in record["gather"])
    return "gpu" if largest == 2 else f"gpu-{largest}"


def markers(record: Record) -> tuple[str, str]:
    """Return the markers of this kind of record."""
    kind = kind_of(record)
    return f"<!-- {kind}-figures:begin -->", f"<!-- {kind}-figures:end -->"


def pages(record: Record, name: str) -> dict[str, str]:
    """Return the text between the markers, by page."""
    if record["sharing"]:
        return {"docs/performance.md": sourced("", as_details(record), name)["docs/performance.md"]}
    return sourced(as_summary(record), as_details(record), name)
