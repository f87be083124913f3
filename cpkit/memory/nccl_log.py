"""Count the kernels that NCCL selected, from its log.

A path report (cpkit.memory.path) predicts the choice from the locations of the buffers. NCCL states
its choice only in its log: set the variables of `environment(file)` before the first collective,
run, and count.

    AllGather [Symmetric]: 65536 Bytes -> Kernel AllGather_ST nchannels 4 …        symmetric
    AllGather [Copy Engine]: 65536 Bytes -> cudaMemcpy; …                          copy engine
    AllGather: 65536 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..23}           fallback

Only rank 0 of a communicator writes these lines. Source: NCCL 2.27.7 to 2.30.7, src/enqueue.cc.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"\b(?P<op>[A-Z]\w+?)(?: \[(?P<kind>Symmetric|Copy Engine)\])?: \d+ Bytes -> (?P<choice>.*)"
)


@dataclass(frozen=True)
class Selections:
    """How often NCCL selected each kind of kernel, for one collective."""

    symmetric: int = 0
    copy_engine: int = 0
    fallback: int = 0

    def __str__(self) -> str:
        return (
            f"{self.symmetric} symmetric, {self.copy_engine} copy engine, {self.fallback} fallback"
        )


def environment(log: Path) -> dict[str, str]:
    """Return the variables to set before NCCL starts, so that it writes its selections to `log`.

    Each process writes its own file, `log` with its process id appended: NCCL truncates its file
    when it opens it, so two ranks with one file would overwrite each other's lines.
    """
    return {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "TUNING,REG,INIT",
        "NCCL_DEBUG_FILE": f"{log}.%p",
    }


def count(lines: Iterable[str], operation: str = "AllGather") -> Selections:
    """Count the selections for one collective in lines of NCCL's log.

    >>> count(["r0 NCCL INFO AllGather: 8 Bytes -> Algo RING proto LL"])
    Selections(symmetric=0, copy_engine=0, fallback=1)
    """
    found = [match for line in lines if (match := _LINE.search(line)) and match["op"] == operation]
    symmetric = sum(match["kind"] == "Symmetric" for match in found)
    copy_engine = sum(match["kind"] == "Copy Engine" for match in found)
    return Selections(symmetric, copy_engine, len(found) - symmetric - copy_engine)


def count_file(log: Path, operation: str = "AllGather") -> Selections:
    """Count the selections in the logs of all processes; all zero without a log."""
    files = sorted(log.parent.glob(f"{log.name}.*"))
    return count(
        (line for file in files for line in file.read_text(errors="replace").splitlines()),
        operation,
    )
