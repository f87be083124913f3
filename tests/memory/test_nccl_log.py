"""Count which algorithms NCCL selected, from lines of its log."""

from __future__ import annotations

from pathlib import Path

from cpkit.memory.nccl_log import Selections, count, count_file, environment

_SAID = (
    "AllGather: 1048576 Bytes -> Algo RING proto SIMPLE channel{Lo..Hi}={0..15}",
    "AllGather [Symmetric]: 65536 Bytes -> Kernel AllGather_STMC nchannels 4 nthreads 512",
    "AllGather [Symmetric]: 512 Bytes -> Kernel AllGather_LL nchannels 1 nthreads 512",
    "AllGather [Copy Engine]: 65536 Bytes -> cudaMemcpy; CE synchronization",
    "AllReduce: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..0}",
    "Symmetric memory is not supported. cuMemEnable 0",
)
LOG = "".join(f"node:1:9 [0] NCCL INFO {words}\n" for words in _SAID)


def test_selections_are_counted_by_kind_and_collective() -> None:
    assert count(LOG.splitlines()) == Selections(2, 1, 1)
    assert count(LOG.splitlines(), "AllReduce") == Selections(0, 0, 1)
    assert str(count([])) == "0 symmetric, 0 copy engine, 0 fallback"


def test_the_logs_of_all_processes_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "nccl.log"
    assert count_file(log) == Selections()
    for pid in ("7", "8"):
        (tmp_path / f"nccl.log.{pid}").write_text(LOG)
    assert count_file(log).symmetric == 4
    assert environment(log)["NCCL_DEBUG_FILE"] == f"{log}.%p", "two ranks never share a file"
