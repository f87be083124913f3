"""The channel between rank 0 and the other ranks, with all its ends in one process."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from cpkit.worker.commands import CommandChannel, End, KeepAlive, StepResult
from cpkit.worker.scheduler import first_to_fail


def channels(size: int) -> list[CommandChannel]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    return [CommandChannel(store, rank, size) for rank in range(size)]


def never(ranks: list[int], waited_s: float) -> None:
    pytest.fail(f"rank(s) {ranks} are late after {waited_s} s")


def test_every_rank_receives_every_command_and_rank_0_every_answer() -> None:
    first, *others = channels(3)
    for command in (End((1, 2)), KeepAlive(), End(tuple(range(100_000)))):
        first.send(command)
        assert [other.receive() for other in others] == [command, command]
        for channel in (*others, first):
            channel.answer(StepResult(b"x" * (channel.rank << 20)))
        answers = first.answers(never)
        assert [len(answer.report) for answer in answers] == [0, 1 << 20, 2 << 20]


def test_the_rank_that_failed_is_named_and_not_one_that_waited_for_it() -> None:
    waited, failed, fine = (
        StepResult(error="waited for rank 1", timed_out=True),
        StepResult(error="no memory"),
        StepResult(),
    )
    assert first_to_fail([waited, failed, fine]) == 1
    assert first_to_fail([fine, waited, waited]) == 1
    assert first_to_fail([failed, waited, failed]) == 0


def test_after_a_timeout_the_late_rank_is_reported_within_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that waited for the late one has waited for the deadline already."""
    monkeypatch.setenv("CPKIT_DEADLINE_S", "60")
    monkeypatch.setattr("cpkit.worker.commands._MARGIN_S", 0.1)
    first, second, third = channels(3)
    other_connection = first._store.underlying_store.clone()
    first.send(KeepAlive())
    assert first.overdue_s(other_connection) == 0
    second.receive()
    second.answer(StepResult(error="waited for the ranks 0 and 2", timed_out=True))
    assert first.overdue_s(other_connection) > 0
    first.answer(StepResult())
    assert first.overdue_s(other_connection) == 0

    def report_late(ranks: list[int], waited_s: float) -> None:
        assert ranks == [2]
        third.receive()
        third.answer(StepResult())

    assert [answer.timed_out for answer in first.answers(report_late)] == [False, True, False]


def test_a_rank_that_waits_for_one_that_failed_is_not_reported_at_its_own_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise it, and not the failure, would be the error of the request."""
    monkeypatch.setenv("CPKIT_DEADLINE_S", "0.2")
    first, second = channels(2)
    first.send(KeepAlive())
    first.answer(StepResult(error="no memory"))
    waits = StepResult(error="waited for rank 0", timed_out=True)
    second.receive()
    timer = threading.Timer(0.5, second.answer, (waits,))
    timer.start()
    assert first_to_fail(first.answers(never)) == 0
    timer.join()


def test_late_ranks_are_reported_after_the_deadline_and_their_answers_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each answer renews the deadline, and the next command works."""
    monkeypatch.setenv("CPKIT_DEADLINE_S", "0.5")
    first, second, third = channels(3)
    first.send(KeepAlive())
    first.answer(StepResult(b"first"))
    reported = []

    def report_late(ranks: list[int], waited_s: float) -> None:
        reported.append(ranks)
        assert waited_s >= 0.5 * len(reported)
        late = {1: second, 2: third}[ranks[0]]
        assert late.receive() == KeepAlive()
        late.answer(StepResult(b"late %d" % ranks[0]))

    answers = first.answers(report_late)
    assert reported == [[1, 2], [2]]
    assert [answer.report for answer in answers] == [b"first", b"late 1", b"late 2"]
    first.send(End((7,)))
    assert (second.receive(), third.receive()) == (End((7,)), End((7,)))
