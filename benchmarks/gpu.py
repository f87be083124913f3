"""`make bench-gpu`: measure on this machine's GPUs, print the figures, record them.

    python -m benchmarks.gpu [--quick] [--no-record] [--cp-sizes 2,4,8] [--rounds 3] [--fill RECORD]

With fewer GPUs than ranks, ranks share a GPU, and NVIDIA's MPS daemon runs during the measurement.
Without it, the GPU would switch between processes, and every barrier would wait for a time slice.
The floor is the time to move (cp + 1) times the gathered bytes, the minimum in one memory shared by
all ranks, at the rate of the device's own copy in the same run.
"""

from __future__ import annotations

import argparse
import shutil
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

TOKENS = (512, 2048, 9216, 36864, 65536, 131072)  # 1, 4, 19, 75, 134, 268 MB
QUICK_TOKENS = (512, 36864)
ROUNDS = 3


def main() -> int:
    """Run the benchmark. A wrong result is an error."""
    parser = argparse.ArgumentParser(description="Measure cpkit on this machine's GPUs.")
    parser.add_argument("--quick", action="store_true", help="two sizes, one round, no record")
    parser.add_argument("--no-record", action="store_true", help="print, but write no file")
    parser.add_argument("--cp-sizes", default="2,4,8", help="comma-separated, default 2,4,8")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--fill", type=Path, help="only put this record's figures into the pages")
    options = parser.parse_args()
    if options.fill:
        gpu_figures.fill_pages(ROOT, options.fill)
        return 0
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device and a CUDA build of torch; `make bench` does not")
        return 2
    cp_sizes = [int(part) for part in options.cp_sizes.split(",")]
    tokens, rounds = (QUICK_TOKENS, 1) if options.quick else (TOKENS, options.rounds)
    record: dict[str, Any] = {"environment": gpu_environment(), "gather": [], "missing": {}}
    record["plan"] = {"tokens": tokens, "rounds": rounds, "strategy": "zigzag", "rows": [8, 128]}
    for cp_size in cp_sizes:
        measure(record, cp_size, tokens, rounds)
    record["goals"] = goals_of(record["gather"])
    print(gpu_figures.as_text(record))
    if not (options.quick or options.no_record):
        keep(record, "gpu", gpu_figures.fill_pages)
    return 0


def measure(record: dict[str, Any], cp_size: int, tokens: tuple[int, ...], rounds: int) -> None:
    """Add all rounds at one cp_size to the record."""
    say(f"gather, cp_size {cp_size} ...")
    shared = cp_size > torch.cuda.device_count()
    one_memory = torch.cuda.device_count() == 1
    with TemporaryDirectory(prefix="cpkit-") as directory, ExitStack() as stack:
        if shared:
            words = stack.enter_context(mps.serve(Path(directory)))
            say(words)
            record["sharing"] = words.replace(directory, "…")
        launches = [on_ranks(cp_size, "benchmarks.gpu_ranks", *tokens) for _ in range(rounds)]
    ceilings = [launch["ceiling_gbps"] for launch in launches]
    ceiling_gbps = sorted(ceilings)[len(ceilings) // 2]
    for place, count in enumerate(tokens):
        sizes = [launch["sizes"][place] for launch in launches]
        record["missing"] |= {f"cp_size {cp_size}, {count} tokens": sizes[0]["missing"]}
        for name in sizes[0]["variants"]:
            samples = [size["variants"][name]["samples_us"] for size in sizes]
            line = row(name, cp_size, count, sizes[0]["padded_bytes"], samples)
            floor_us = (cp_size + 1) * line["size_bytes"] / ceiling_gbps / 1e3
            line |= {"floor_us": floor_us if one_memory else None, "ceiling_gbps": ceiling_gbps}
            record["gather"].append(line)


def gpu_environment() -> dict[str, Any]:
    """Return the machine, the versions and the GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **environment("make bench-gpu", ", ".join(gpus)),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "nccl": ".".join(map(str, loaded_nccl_version())) if dist.is_nccl_available() else "",
    }


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return driver.stdout.split("\n")[0].strip()


if __name__ == "__main__":
    run_command(main)
