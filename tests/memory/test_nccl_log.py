"""Which kernels NCCL selected, from lines of its log, and the log of a running process."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpkit.memory import nccl_log
from cpkit.memory.nccl_log import Selection, count, count_file, environment, observe

_SAID = (
    "AllGather: 1048576 Bytes -> Algo RING proto SIMPLE channel{Lo..Hi}={0..15}",
    "AllGather [Symmetric]: 65536 Bytes -> Kernel AllGather_STMC nchannels 4 nthreads 512 nWorks 1",
    "AllGather [Symmetric]: 512 Bytes -> Kernel AllGather_LL nchannels 1 nthreads 512",
    "AllGather [Copy Engine]: 65536 Bytes -> cudaMemcpy; CE synchronization with NVLS",
    "AllReduce: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..0}",
    "Symmetric memory is not supported. cuMemEnable 0",
)
LOG = "".join(f"node:1:9 [0] NCCL INFO {words}\n" for words in _SAID)
NAMES = ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE")


def test_selections_are_named_in_the_order_of_the_calls() -> None:
    assert count(LOG.splitlines()).calls == (
        Selection("fallback", "RING SIMPLE", 16, 1048576),
        Selection("symmetric", "AllGather_STMC", 4, 65536),
        Selection("symmetric", "AllGather_LL", 1, 512),
        Selection("copy engine", "cudaMemcpy", 0, 65536),
    )


def test_selections_are_counted_by_kind_and_collective() -> None:
    gathers = count(LOG.splitlines())
    assert (gathers.symmetric, gathers.copy_engine, gathers.fallback) == (2, 1, 1)
    assert gathers.kernels == ("RING SIMPLE", "AllGather_STMC", "AllGather_LL", "cudaMemcpy")
    (reduced,) = count(LOG.splitlines(), "AllReduce").calls
    assert str(reduced) == "fallback: RING LL, 1 channel, 8 bytes per rank"


def test_equal_selections_are_shown_once() -> None:
    line = f"NCCL INFO {_SAID[1]}"
    assert str(count([line, line])) == (
        "2 × symmetric: AllGather_STMC, 4 channels, 65536 bytes per rank"
    )
    assert str(count([])) == "nothing observed: NCCL logged no such collective"


def test_a_choice_in_other_words_is_kept() -> None:
    lines = (
        "NCCL INFO AllGather: 8 Bytes -> Algo TREE",
        "NCCL INFO AllGather [Symmetric]: 8 Bytes -> something new",
        "NCCL INFO AllGather [Hierarchical CE]: 8 Bytes -> RMA proxy + CE",
    )
    assert [(call.kind, call.kernel) for call in count(lines).calls] == [
        ("fallback", "Algo TREE"),
        ("symmetric", "something new"),
        ("copy engine", "RMA proxy + CE"),
    ]


def test_the_logs_of_all_processes_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "nccl.log"
    assert count_file(log).calls == ()
    for pid in ("7", "8"):
        (tmp_path / f"nccl.log.{pid}").write_text(LOG)
    assert count_file(log).symmetric == 4
    assert environment(log)["NCCL_DEBUG_FILE"] == f"{log}.%p", "two ranks never share a file"


class FakeNccl:
    """NCCL's log: the variables count from one reset to the next, and a reset opens the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        self.file: Path | None = None
        self.reset()
        monkeypatch.setattr(nccl_log, "_reset_function", lambda: self.reset)

    def reset(self) -> None:
        path = os.environ.get("NCCL_DEBUG_FILE", "").replace("%p", str(os.getpid()))
        is_on = os.environ.get("NCCL_DEBUG") == "INFO" and path
        self.file = Path(path) if is_on else None
        if self.file:
            assert "TUNING" in os.environ["NCCL_DEBUG_SUBSYS"]
            self.file.write_text("")

    def gather(self) -> None:
        if self.file:
            with self.file.open("a") as log:
                log.write(f"node:1:9 [0] NCCL INFO {_SAID[1]}\n")


def test_the_log_of_a_running_process_is_on_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl = FakeNccl(monkeypatch)
    nccl.gather()
    for _ in range(2):
        seen = observe(nccl.gather)
        assert seen.kernels == ("AllGather_STMC",)
        assert len(seen.calls) == 1, "lines of an earlier call"
        assert nccl.file is None
        assert not any(name in os.environ for name in NAMES)


def test_the_log_is_off_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl = FakeNccl(monkeypatch)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with pytest.raises(ZeroDivisionError):
        observe(lambda: 1 // 0)
    assert nccl.file is None
    assert {name: os.environ.get(name) for name in NAMES} == {
        "NCCL_DEBUG": "WARN",
        "NCCL_DEBUG_SUBSYS": None,
        "NCCL_DEBUG_FILE": None,
    }


def test_variables_that_a_process_has_from_the_start_are_only_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nccl = FakeNccl(monkeypatch)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # removed again after the test
    nccl_log.keep_silent()
    silent = {name: os.environ[name] for name in NAMES}
    assert silent == {"NCCL_DEBUG": "VERSION", "NCCL_DEBUG_SUBSYS": "", "NCCL_DEBUG_FILE": ""}
    assert observe(nccl.gather).symmetric == 1
    assert {name: os.environ[name] for name in NAMES} == silent


def test_a_users_log_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nccl = FakeNccl(monkeypatch)
    for name, value in environment(tmp_path / "mine").items():
        monkeypatch.setenv(name, value)
    nccl_log.keep_silent()
    nccl.reset()
    nccl.gather()
    seen = observe(nccl.gather)
    assert seen.calls == ()
    assert "NCCL_DEBUG_FILE is set" in seen.reason
    assert count_file(tmp_path / "mine").symmetric == 2


def without_a_library(name: str, mode: int) -> object:
    raise OSError(name)


@pytest.mark.parametrize("load", [without_a_library, lambda name, mode: SimpleNamespace()])
def test_without_the_function_the_call_is_made_and_nothing_observed(
    load: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_log.ctypes, "CDLL", load)
    made: list[int] = []
    seen = observe(lambda: made.append(1))
    assert made == [1]
    assert "no NCCL library with ncclResetDebugInit is loaded" in str(seen)
