"""What NCCL selected for a gather, beside the path that cpkit predicted: live, or recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cpkit.algorithms import AlgorithmName
from cpkit.lab import Lab
from cpkit_lessons.capabilities import GPU_PER_RANK, capabilities_of
from cpkit_lessons.recordings import RESULTS

ALGORITHMS: tuple[AlgorithmName, ...] = ("padded", "padded_symm_recv", "padded_symm")
SIZES_BYTES = (256_000, 2_091_008, 4_188_160, 67_102_720, 268_429_312)
_REGISTERED = {"padded": "none", "padded_symm_recv": "recv", "padded_symm": "send and recv"}
_TOKEN_BYTES = 2048  # of the gathered tensor, 8 x 128 bfloat16


@dataclass(frozen=True)
class Choices:
    """One row per gather: what was registered, the predicted path, and what NCCL's log says."""

    source: str
    table: pd.DataFrame


def recorded() -> Choices:
    """Return the newest record of NCCL's log."""
    path = max(RESULTS.glob("*-nccl-log.json"))
    content = json.loads(path.read_text("utf-8"))
    where = content["environment"]
    source = (
        f"Recorded on {where['device']} with NCCL {where['nccl']}, {where['date']}, commit "
        f"{where['commit']} ({path.name})"
    )
    return Choices(source, pd.DataFrame(content["selections"]))


def live(lab: Lab, cp_size: int) -> Choices | None:
    """Return what NCCL selects on this machine; None unless each rank has a GPU of its own."""
    if capabilities_of(lab.status()) is not GPU_PER_RANK:
        return None
    table = observe(lab, cp_size, SIZES_BYTES[:-1], ALGORITHMS)
    return Choices(f"Observed here, with {cp_size} ranks", table)


def observe(
    lab: Lab, cp_size: int, sizes_bytes: Sequence[int], algorithms: Sequence[AlgorithmName]
) -> pd.DataFrame:
    """Gather once per size and algorithm, with NCCL's log switched on."""
    rows = []
    for size in sizes_bytes:
        for algorithm in algorithms:
            report = lab.explain(
                size // _TOKEN_BYTES, cp_size, algorithm=algorithm, tensors=1, observe=True
            ).iloc[0]
            rows.append(
                {
                    "size_bytes": size,
                    "algorithm": algorithm,
                    "registered": _REGISTERED[algorithm],
                    "predicted": report["path"],
                    "observed": report["observed"],
                }
            )
    return pd.DataFrame(rows)
