"""Which path the locations of the buffers allow, as tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpkit import devices
from cpkit.memory.path import BufferLocation, BufferPair, decide, unsafe_for_nccl, without_windows

A, B = BufferLocation(0, 256), BufferLocation(0, 512)
ORDINARY = BufferLocation(other="ordinary memory", fault="unregistered")
FOREIGN = BufferLocation(other="in the pool of another group", fault="foreign")


@pytest.mark.parametrize(
    ("send", "recv", "path", "words"),
    [
        ([A, A], [B, B], "symmetric", "and so is send"),
        ([ORDINARY, ORDINARY], [B, B], "symmetric", "send of rank 0 is ordinary memory"),
        ([A, A], [ORDINARY, ORDINARY], "staged", "recv of rank 0 is ordinary memory"),
        ([A, A], [B, ORDINARY], "staged", "recv of rank 1 is ordinary memory"),
        ([A, ORDINARY], [B, ORDINARY], "fallback", "recv of rank 1"),
        ([A, B], [A, B], "fallback", "different segments/offsets"),
        ([A, A], [A, BufferLocation(1, 256)], "staged", "rank 0: 0/256, rank 1: 1/256"),
    ],
)
def test_paths(
    send: list[BufferLocation], recv: list[BufferLocation], path: str, words: str
) -> None:
    places = [BufferPair(s, r) for s, r in zip(send, recv, strict=True)]
    reports = [decide(places, rank) for rank in (0, 1)]
    assert {report.path for report in reports} == {path}
    assert words in reports[0].reason
    assert reports[1].recv == str(recv[1])


@pytest.mark.parametrize(
    ("version", "send", "path"),
    [
        ("2.26.5", A, "fallback"),
        ("2.27.7", ORDINARY, "fallback"),
        ("2.27.7", A, "symmetric"),
        ("2.28.9", ORDINARY, "fallback"),
        ("2.28.9", A, "symmetric"),
        ("2.29.2", ORDINARY, "symmetric"),
        ("2.30.7", ORDINARY, "symmetric"),
    ],
)
def test_the_path_of_nccl_depends_on_its_version(
    version: str, send: BufferLocation, path: str
) -> None:
    report = decide([BufferPair(send, B), BufferPair(send, B)], 1, f"nccl {version}")
    assert report.path == path
    assert report.reason.startswith(f"NCCL {version}: ")
    # Without a symmetric receive buffer, every version falls back.
    assert decide([BufferPair(A, ORDINARY)] * 2, 0, f"nccl {version}").path == "fallback"


@pytest.mark.parametrize(
    ("send", "recv", "unsafe"),
    [
        ([A, A], [B, B], (False, False)),
        ([ORDINARY] * 2, [ORDINARY] * 2, (False, False)),
        ([ORDINARY] * 2, [B, B], (False, False)),
        ([A, A], [ORDINARY] * 2, (False, False)),
        ([A, B], [B, B], (False, False)),  # each rank reads its own shard
        ([A, B], [ORDINARY] * 2, (True, False)),
        ([A, ORDINARY], [B, B], (True, False)),  # the ranks would select different kernels
        ([A, A], [A, B], (False, True)),
        ([A, B], [A, B], (True, True)),
        ([A, A], [B, ORDINARY], (False, True)),
        ([FOREIGN] * 2, [FOREIGN] * 2, (True, True)),
    ],
)
def test_nccl_never_gets_buffers_that_it_would_store_to_wrongly(
    send: list[BufferLocation], recv: list[BufferLocation], unsafe: tuple[bool, bool]
) -> None:
    places = [BufferPair(s, r) for s, r in zip(send, recv, strict=True)]
    assert unsafe_for_nccl(places) == unsafe
    if unsafe[1]:
        report = decide(places, 0, "nccl 2.30.7")
        assert report.path == "fallback"
        assert "NCCL gets ordinary copies" in report.reason


def test_nccl_accepts_any_offset_of_the_send_buffer() -> None:
    assert decide([BufferPair(A, B), BufferPair(B, B)], 0, "nccl 2.28.9").path == "symmetric"


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ([ORDINARY] * 2, "SGLang #37337"),
        ([FOREIGN] * 2, "SGLang #19329"),
        ([A, B], "pytorch#178138"),
    ],
)
def test_every_fault_refers_to_its_issue(where: list[BufferLocation], number: str) -> None:
    report = decide([BufferPair(A, place) for place in where], 0, "nccl 2.29.7")
    assert number in report.reason


def test_the_race_of_some_nccl_versions_is_named() -> None:
    for version, racy in (("2.27.7", False), ("2.28.9", True), ("2.30.4", True), ("2.30.7", False)):
        reason = decide([BufferPair(A, B)], 0, f"nccl {version}").reason
        assert ("sglang#37768" in reason) is racy


def test_a_registered_send_buffer_alone_may_select_the_staging_kernel() -> None:
    for version, may in (("2.28.9", False), ("2.29.7", True), ("2.30.7", True)):
        report = decide([BufferPair(A, ORDINARY)] * 2, 0, f"nccl {version}")
        assert (report.path, "AllGather_LL" in report.reason) == ("fallback", may), report
        # Of a recv buffer at different offsets NCCL receives a copy: it is ordinary memory too.
        report = decide([BufferPair(A, A), BufferPair(A, B)], 0, f"nccl {version}")
        assert (report.path, "AllGather_LL" in report.reason) == ("fallback", may), report
    alone = [BufferPair(A, ORDINARY)] * 2
    for transport, has_windows in (("nccl 2.29.2 NCCL_CTA_POLICY=2", True), ("nccl 2.30.7", False)):
        report = decide(alone, 0, transport, has_windows=has_windows)
        assert "AllGather_LL" not in report.reason, "without a window NCCL sees no such buffer"
    report = decide([BufferPair(A, ORDINARY), BufferPair(B, ORDINARY)], 0, "nccl 2.30.7")
    assert "AllGather_LL" not in report.reason, "NCCL receives copies of these, and has no choice"


@pytest.mark.parametrize("transport", ["nccl", "nccl 2.30.7 NCCL_CTA_POLICY=1", "2.30.7"])
def test_an_unknown_transport_is_refused(transport: str) -> None:
    with pytest.raises(ValueError, match="it must be 'posix', 'cuda', or NCCL"):
        decide([BufferPair(A, B)], 0, transport)


@pytest.mark.parametrize(
    ("version", "send", "path", "words"),
    [
        ("2.27.7", A, "symmetric", "recv is registered"),  # it has no copy engine
        ("2.28.9", A, "fallback", "nccl#2003"),
        ("2.28.9", ORDINARY, "fallback", "SGLang #37337"),
        ("2.29.2", ORDINARY, "fallback", "nccl#2003"),
        ("2.29.7", ORDINARY, "symmetric", "the copy engine moves the rows"),
        ("2.30.7", A, "symmetric", "the copy engine moves the rows"),
    ],
)
def test_under_the_zero_policy_the_copy_engine_moves_the_rows(
    version: str, send: BufferLocation, path: str, words: str
) -> None:
    report = decide([BufferPair(send, B)] * 2, 0, f"nccl {version} NCCL_CTA_POLICY=2")
    assert report.path == path
    assert report.reason.startswith(f"NCCL {version} NCCL_CTA_POLICY=2: ")
    assert words in report.reason
    assert "sglang#37768" not in report.reason, "the race is that of the symmetric kernels"
    without = decide([BufferPair(send, B)] * 2, 0, f"nccl {version}")
    assert "copy engine" not in without.reason
    fallback = decide([BufferPair(A, ORDINARY)] * 2, 0, f"nccl {version} NCCL_CTA_POLICY=2")
    assert fallback.path == "fallback"


def test_unregistered_memory_has_no_symmetric_path() -> None:
    symmetric = decide([BufferPair(A, B)], 0, "nccl 2.30.7")
    assert without_windows(symmetric, "") == symmetric
    report = without_windows(symmetric, "NCCL did not register the pool")
    assert (report.path, report.reason) == ("fallback", "NCCL did not register the pool")
    fallback = decide([BufferPair(A, ORDINARY)], 0, "nccl 2.30.7")
    assert without_windows(fallback, "NCCL did not register the pool") == fallback


@pytest.mark.parametrize(("status", "version"), [(0, (2, 30, 7)), (1, (2, 28, 9))])
def test_the_version_of_nccl_is_that_of_the_loaded_library(
    status: int, version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version than torch was compiled with; that one counts if no library answers."""

    def answer(number: Any) -> int:
        number._obj.value = 23007
        return status

    library = SimpleNamespace(ncclGetVersion=answer)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name, mode: library)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    devices.loaded_nccl_version.cache_clear()
    assert devices.loaded_nccl_version() == version
    devices.loaded_nccl_version.cache_clear()
