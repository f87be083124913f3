"""`make bench-gpu`: measure on this machine's GPUs, print the figures, record them.

    python -m benchmarks.gpu [--quick] [--no-record] [--cp-sizes 2,4] [--rounds 3] [--fill RECORD]

Each rank has its own GPU where there are enough; the floor is then what the link needs: copies of a
rank's shard to its peers, by the copy engine in the same run. With fewer GPUs than ranks, ranks
share a GPU, and NVIDIA's MPS daemon runs during the measurement. Without it, the GPU would switch
between processes, and every barrier would wait for a time slice. The floor is then the time to move
(cp + 1) times the gathered bytes at the rate of the device's own copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gpu_figures
from benchmarks.gpu_goals import goals_of
from benchmarks.launch import ROOT, keep, on_ranks, say
from benchmarks.machine import environment
from benchmarks.rows import row
from cpkit.control import mps
from cpkit.devices import loaded_nccl_version
from cpkit.processes import run_command

LARGE = 32765
TOKENS = (125, 509, 1021, 2045, 8189, LARGE, 131069)  # 0.26 to 268 MB, ragged
QUICK_TOKENS = (125, LARGE)
ROWS = "8x128:bfloat16"
ROW_BYTES = 2048
COPIES = 40  # of the gathered rows that a rank holds in its variants' graphs (8 ranks: 38)
HEADLINE = "16384:128:uint8"  # upstream's index keys of 16K tokens (SGLang #17756)
ROUNDS = 3


def main() -> int:
    """Run the benchmark. A wrong result is an error."""
    parser = argparse.ArgumentParser(description="Measure cpkit on this machine's GPUs.")
    parser.add_argument("--quick", action="store_true", help="two sizes, one round, no record")
    parser.add_argument("--no-record", action="store_true", help="print, but write no file")
    parser.add_argument(
        "--cp-sizes", help="comma-separated; default: up to one per GPU, 2,4,8 on a single GPU"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--fill", type=Path, help="only put this record's figures into the pages")
    options = parser.parse_args()
    if options.fill:
        gpu_figures.fill_pages(ROOT, options.fill)
        return 0
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device and a CUDA build of torch; `make bench` does not")
        return 2
    gpus = torch.cuda.device_count()
    cp_sizes = [int(part) for part in (options.cp_sizes or default_cp_sizes(gpus)).split(",")]
    if min(cp_sizes) <= gpus < max(cp_sizes):
        print(
            f"--cp-sizes {options.cp_sizes}: some have a GPU per rank here ({gpus} GPUs), others "
            f"share one, and their figures cannot be compared: run them apart"
        )
        return 2
    tokens, rounds = (QUICK_TOKENS, 1) if options.quick else (TOKENS, options.rounds)
    shared = max(cp_sizes) > gpus
    record: dict[str, Any] = {
        "environment": gpu_environment(),
        "sharing": "",
        "plan": {"tokens": tokens, "rounds": rounds, "strategy": "zigzag", "rows": [8, 128]},
        "gather": [],
        "headline": [],
        "beside": [],
        "missing": {},
    }
    for cp_size in cp_sizes:
        measure(record, cp_size, tokens, rounds, shared=shared)
    record["environment"]["clocks_after"] = clocks()
    record["goals"] = goals_of(record)
    print(gpu_figures.as_text(record))
    if not (options.quick or options.no_record):
        keep(record, gpu_figures.kind_of(record), gpu_figures.fill_pages)
    return 0


def default_cp_sizes(gpus: int) -> str:
    """Return the powers of two up to the number of GPUs; 2, 4 and 8 for a single one.

    >>> default_cp_sizes(1), default_cp_sizes(2), default_cp_sizes(8)
    ('2,4,8', '2', '2,4,8')
    """
    return ",".join(str(n) for n in (2, 4, 8) if gpus == 1 or n <= gpus)


def measure(
    record: dict[str, Any], cp_size: int, tokens: tuple[int, ...], rounds: int, *, shared: bool
) -> None:
    """Add all rounds at one cp_size to the record."""
    say(f"gather, cp_size {cp_size} ...")
    beside = "" if shared else ":matmul"
    ranks_per_gpu = cp_size if shared else 1
    for n in (n for n in tokens if not fits(n, ranks_per_gpu)):
        record["missing"][f"cp_size {cp_size}, {n} tokens"] = (
            f"{ranks_per_gpu} ranks need about {needed_gb(n, ranks_per_gpu):.0f} GB of one GPU"
        )
    measured = [n for n in tokens if fits(n, ranks_per_gpu)]
    cases = [f"{n}:{ROWS}{beside if n == LARGE else ''}" for n in measured] + [HEADLINE]
    with TemporaryDirectory(prefix="cpkit-") as directory, ExitStack() as stack:
        if shared:
            words = stack.enter_context(mps.serve(Path(directory)))
            say(words)
            record["sharing"] = words.replace(directory, "…")
        launches = [on_ranks(cp_size, "benchmarks.gpu_ranks", *cases) for _ in range(rounds)]
    ceiling_gbps = statistics.median(launch["ceiling_gbps"] for launch in launches)
    for number, case in enumerate(cases):
        sizes = [launch["sizes"][number] for launch in launches]
        lines = rows_of(sizes, cp_size, ceiling_gbps, shared=shared)
        record["headline" if case == HEADLINE else "gather"] += lines
        if sizes[0]["missing"]:
            record["missing"][f"cp_size {cp_size}, {case}"] = sizes[0]["missing"]
        for name, first in sizes[0].get("beside", {}).items():
            both = {
                key: statistics.median(each["beside"][name][key] for each in sizes) for key in first
            }
            (line,) = (each for each in lines if each["variant"] == name)
            alone = {key: line[key] for key in ("variant", "cp_size", "size_bytes", "time_us")}
            record["beside"].append(alone | both)


def needed_gb(tokens: int, ranks_per_gpu: int) -> float:
    """Return the memory of one GPU that a size needs, in GB: all variants are captured at once."""
    return tokens * ROW_BYTES * COPIES * ranks_per_gpu / 1e9


def fits(tokens: int, ranks_per_gpu: int) -> bool:
    """Return True when this GPU has the memory for a size."""
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    return needed_gb(tokens, ranks_per_gpu) < 0.95 * total_bytes / 1e9


def rows_of(
    sizes: list[dict[str, Any]], cp_size: int, ceiling_gbps: float, *, shared: bool
) -> list[dict[str, Any]]:
    """Return one row per variant of one size, from all rounds."""
    first, lines = sizes[0], []
    for name in first["variants"]:
        found = [size["variants"][name] for size in sizes]
        samples = [each["samples_us"] for each in found]
        line = row(
            name, cp_size, first["tokens"], first["padded_bytes"], samples, first["row_bytes"]
        )
        for clock in ("call_us", "host_us"):
            line[clock] = statistics.median(
                max(statistics.median(rank) for rank in each[clock]) for each in found
            )
        lines.append(line)
    times = {line["variant"]: line["time_us"] for line in lines}
    moved_bytes = (cp_size + 1) * lines[0]["size_bytes"]
    floor_us = moved_bytes / ceiling_gbps / 1e3 if shared else times["peer copies"]
    return [line | {"floor_us": floor_us, "ceiling_gbps": ceiling_gbps} for line in lines]


def gpu_environment() -> dict[str, Any]:
    """Return the machine, the versions and the GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **environment("make bench-gpu", f"{len(gpus)} x {gpus[0]}" if gpus[1:] else gpus[0]),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "driver": query("driver_version"),
        "nccl": ".".join(map(str, loaded_nccl_version())) if dist.is_nccl_available() else "",
        "multicast": "off" if os.environ.get("NCCL_NVLS_ENABLE") == "0" else "as NCCL chose",
        "clocks_before": clocks(),
    }


def clocks() -> str:
    """Return the current and the highest clock of the multiprocessors of each GPU."""
    return query("clocks.sm,clocks.max.sm")


def query(fields: str) -> str:
    """Return what nvidia-smi says about the GPUs; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "; ".join(dict.fromkeys(answer.stdout.strip().split("\n")))


if __name__ == "__main__":
    run_command(main)
