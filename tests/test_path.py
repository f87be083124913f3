"""Which path buffers allow, as a table."""

from __future__ import annotations

import pytest

from cpkit.path import Place, Where, decide

A, B = Where(0, 256), Where(0, 512)
ORDINARY = Where(other="ordinary memory")


@pytest.mark.parametrize(
    ("send", "recv", "path", "words"),
    [
        ([A, A], [B, B], "symmetric", "and so is send"),
        ([ORDINARY, ORDINARY], [B, B], "symmetric", "send of rank 0 is ordinary memory"),
        ([A, A], [ORDINARY, ORDINARY], "staged", "recv of rank 0 is ordinary memory"),
        ([A, A], [B, ORDINARY], "staged", "recv of rank 1 is ordinary memory"),
        ([A, ORDINARY], [B, ORDINARY], "fallback", "recv of rank 1"),
        ([A, B], [A, B], "fallback", "different segment/offset"),
        ([A, A], [A, Where(1, 256)], "staged", "rank 0: 0/256, rank 1: 1/256"),
    ],
)
def test_paths(send: list[Where], recv: list[Where], path: str, words: str) -> None:
    places = [Place(s, r) for s, r in zip(send, recv, strict=True)]
    reports = [decide(places, rank) for rank in (0, 1)]
    assert {report.path for report in reports} == {path}
    assert words in reports[0].reason
    assert reports[1].recv == str(recv[1])
