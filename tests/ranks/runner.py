"""Run every `check_*` of some modules on every rank; torchrun starts this for a test.

    torchrun … -m tests.ranks.runner MODULE[,MODULE…] RESULTS_DIR

Each rank writes one JSON file that maps a check to "" if it passed, otherwise to its traceback. All
ranks forget their groups after each check, so that one that fails does not affect the next.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from cpkit.devices import use_local_gpu
from cpkit.group import forget_groups
from cpkit.processes import leave
from tests.ranks.device import DEVICE


def main() -> None:
    if DEVICE == "cuda":
        use_local_gpu()
    modules = [importlib.import_module(name) for name in sys.argv[1].split(",")]
    checks = {
        name: check
        for module in modules
        for name, check in vars(module).items()
        if name.startswith("check_")
    }
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[str, str] = {}
    for name, check in checks.items():
        began = time.monotonic()
        try:
            check()
            results[name] = ""
        except BaseException:  # noqa: BLE001 - whatever it is, it goes into the report
            results[name] = traceback.format_exc()
        forget_groups()
        dist.barrier()
        if rank == 0:  # for the log of a launch that hangs or is slow
            print(f"{time.monotonic() - began:6.2f} s  {name}", flush=True)
    (Path(sys.argv[2]) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
