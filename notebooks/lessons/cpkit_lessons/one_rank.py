"""One rank of a cell: run the function of `program.py`, and write what it returned.

    python -m cpkit_lessons.one_rank FUNCTION DIRECTORY       (RANK and WORLD_SIZE are set)

`cpkit_lessons.own_ranks` starts and kills these ranks. If it cannot kill a rank, the alarm of the
rank does so after `_LIFE_S`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import msgspec
import torch.distributed as dist

from cpkit.group import CPGroup, init_context_parallel

_LIFE_S = 90


def group_of_all(directory: Path) -> CPGroup:
    """Return the group of all ranks, which meet through a file in `directory`."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return init_context_parallel(size)


def main(function: str, directory: Path) -> None:
    """Run the function on this rank. Does not return; an exception ends the process with 1."""
    signal.alarm(_LIFE_S)
    group = group_of_all(directory)
    program = runpy.run_path(str(directory / "program.py"))[function]
    (directory / f"{group.rank}.json").write_bytes(msgspec.json.encode(program(group)))
    group.barrier()
    sys.stdout.flush()
    os._exit(0)  # skips cleanup, which could wait for dead peers


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
