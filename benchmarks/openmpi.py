"""The strongest competitor on one machine: Open MPI's MPI_Allgatherv with final displacements.

    mpirun -n 4 python -m benchmarks.openmpi OUTPUT.json BLOCK_SECONDS TOKENS...

One call per zigzag block of a rank stores every row at its final place, without padding, strip and
reorder. Buffers are allocated once, as in MPI programs. The ranks import no torch. A sample is
measured as for cpkit: a barrier, then one gather, on every rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cpkit.control.tied import tied

ROOT = Path(__file__).parents[1]
ROW_BYTES = 8 * 128 * 2
VARIANT = "Open MPI"


def available() -> str:
    """Return why Open MPI cannot be measured here, or "" if it can."""
    if not _mpirun().exists():
        return f"Open MPI is not installed here ({_mpirun()} is missing): pip install -e '.[bench]'"
    found = subprocess.run(
        [sys.executable, "-c", "import mpi4py"], capture_output=True, check=False, timeout=60
    )
    return "mpi4py is not installed here: pip install -e '.[bench]'" if found.returncode else ""


def version() -> str:
    """Return the version that Open MPI prints."""
    said = subprocess.run(
        [str(_mpirun()), "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    return (
        said.stdout.splitlines()[0].replace("mpirun (Open MPI)", "Open MPI") if said.stdout else ""
    )


def measure(cp_size: int, tokens: tuple[int, ...], block_s: float) -> list[dict[str, Any]]:
    """Run one launch of mpirun; return the samples by size. A failure is an error."""
    with TemporaryDirectory() as directory:
        output = Path(directory) / "samples.json"
        script = ["-m", "benchmarks.openmpi", str(output), str(block_s), *map(str, tokens)]
        subprocess.run(
            tied(
                [str(_mpirun()), "--oversubscribe", "-n", str(cp_size), sys.executable, *script],
                signal.SIGTERM,
            ),
            cwd=ROOT,
            env=_environment(),
            check=True,
            timeout=600,
        )
        return list(json.loads(output.read_text()))


def _mpirun() -> Path:
    return Path(sys.executable).parent / "mpirun"


def _environment() -> dict[str, str]:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **(as_root if os.geteuid() == 0 else {})}


# ---------------------------------------------------------------------- inside mpirun


def main() -> None:
    """Check and time all sizes on all ranks; rank 0 writes the samples of every rank."""
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    output, block_s, *tokens = sys.argv[1:]
    sizes = []
    for count in map(int, tokens):
        whole = (np.arange(count * ROW_BYTES, dtype=np.int64) % 251).astype(np.uint8)
        gather, result = _prepare(comm, whole, count)
        result.fill(255)
        gather()
        wrong = comm.allreduce(int(not np.array_equal(result, whole)), op=MPI.SUM)
        if wrong:
            raise SystemExit(f"{VARIANT}: wrong result at {count} tokens on {wrong} rank(s)")
        sizes.append({"tokens": count, "samples_us": _samples(comm, gather, float(block_s))})
    sizes.append({"tokens": 0, "samples_us": _samples(comm, comm.Barrier, 0.3, 2000)})
    if comm.rank == 0:
        Path(output).write_text(json.dumps(sizes))


def _prepare(comm: Any, whole: Any, count: int) -> tuple[Callable[[], None], Any]:
    """Return the gather of this rank's two zigzag blocks, and its output."""
    import numpy as np
    from mpi4py import MPI

    rank, cp_size, blocks = comm.rank, comm.size, 2 * comm.size
    size = [(count // blocks + (i < count % blocks)) * ROW_BYTES for i in range(blocks)]
    start = [sum(size[:i]) for i in range(blocks)]
    result = np.empty_like(whole)
    halves = []
    for block_of in (lambda r: r, lambda r: blocks - 1 - r):
        mine = block_of(rank)
        shard = whole[start[mine] : start[mine] + size[mine]].copy()
        owned = [block_of(r) for r in range(cp_size)]
        places = [[size[b] for b in owned], [start[b] for b in owned], MPI.BYTE]
        halves.append(([shard, MPI.BYTE], [result, *places]))

    def gather() -> None:
        for send, receive in halves:
            comm.Allgatherv(send, receive)

    return gather, result


def _samples(
    comm: Any, call: Callable[[], None], block_s: float, at_most: int = 200
) -> list[list[float]]:
    """Return the µs of each call by rank: as many calls as fit into `block_s`, at least 3."""
    from mpi4py import MPI

    def once() -> float:
        comm.Barrier()
        start_ns = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start_ns) / 1e3

    once()
    trial_us = comm.allreduce(once(), op=MPI.MAX)  # the second warm-up call
    iterations = max(3, min(at_most, int(block_s * 1e6 / max(trial_us, 1.0))))
    return list(comm.allgather([once() for _ in range(iterations)]))


if __name__ == "__main__":
    main()
