"""Record which kernels NCCL selects for a gather, from its own log: one GPU per rank is needed.

    python -m benchmarks.nccl_choices

Writes benchmarks/results/DATE-nccl-log.json. Notebook 3 shows it beside the predicted paths.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import cpkit
from benchmarks.launch import ROOT, say
from benchmarks.machine import environment
from cpkit.devices import loaded_nccl_version
from cpkit_lessons.nccl_choices import ALGORITHMS, SIZES_BYTES, observe


def main() -> int:
    """Observe one gather per size and algorithm, and write the record."""
    ranks = torch.cuda.device_count()
    if ranks < 2:
        say("benchmarks.nccl_choices needs two GPUs or more")
        return 2
    where = environment("python -m benchmarks.nccl_choices", torch.cuda.get_device_name())
    where |= {
        "device": f"{ranks} x {torch.cuda.get_device_name()}",
        "nccl": ".".join(map(str, loaded_nccl_version())),
    }
    with cpkit.connect("nccl-choices", nproc=ranks) as lab:
        selections = observe(lab, ranks, SIZES_BYTES, ALGORITHMS).to_dict("records")
    content: dict[str, Any] = {"environment": where, "selections": selections}
    path = ROOT / "benchmarks" / "results" / f"{where['date']}-nccl-log.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
