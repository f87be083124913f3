"""The table of gather algorithms. It does not import torch, so the notebook side can read it.

    algorithm          passes over the rows                    symmetric buffers
    padded             pad, wire, strip, reorder               none
    padded_symm_recv   pad, wire, strip, reorder               receive
    padded_symm        pad, wire, strip, reorder               send, receive
    direct             wire                                    receive (the output itself)

`cpkit.gather` maps each name to its function, `cpkit.notebook.style` to its colour. To add an
algorithm, add its row here and its function there. Workers add the rows of their own algorithms
(`cpkit.worker.own_algorithms`), whose names clients read in the workers' status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

AlgorithmName = Literal["padded", "padded_symm_recv", "padded_symm", "direct"]
ALGORITHMS: tuple[AlgorithmName, ...] = get_args(AlgorithmName)
# The choices in a notebook: "plan" is `direct`, prepared once (`cpkit.plan.plan_gather_kv`).
AlgorithmChoice = Literal[AlgorithmName, "plan"]
ALGORITHM_CHOICES: tuple[AlgorithmChoice, ...] = get_args(AlgorithmChoice)
AnyAlgorithm = AlgorithmChoice | str  # or one of the workers' own


@dataclass(frozen=True)
class Algorithm:
    """One algorithm: its passes over the data, and which of its buffers are symmetric.

    `plan_gains` is true where a prepared gather (`cpkit.plan`) is faster than a single call. With
    `any_memory` it also runs where symmetric memory is not possible; the others run as `padded`.
    """

    name: str
    passes: tuple[str, ...]
    symmetric_send: bool = False
    symmetric_recv: bool = False
    plan_gains: bool = False
    any_memory: bool = False


_ALL_PASSES = ("pad", "wire", "strip", "reorder")

TABLE: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("padded", _ALL_PASSES, any_memory=True),
        Algorithm("padded_symm_recv", _ALL_PASSES, symmetric_recv=True),
        Algorithm("padded_symm", _ALL_PASSES, symmetric_send=True, symmetric_recv=True),
        Algorithm("direct", ("wire",), symmetric_recv=True, plan_gains=True),
    )
}


def all_choices() -> tuple[str, ...]:
    """Return the names that this process accepts: the choices, then the user's own."""
    return (*ALGORITHM_CHOICES, *(name for name in TABLE if name not in ALGORITHMS))
