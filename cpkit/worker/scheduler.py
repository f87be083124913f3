"""The work loop: every rank performs orders; rank 0 makes them from the requests that wait.

Jobs are generators, so several may be open at once and take turns step by step; the order of steps
is the same on all ranks, because rank 0 gives it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from typing import Any

import msgspec

from cpkit.control.messages import (
    Body,
    Done,
    Failed,
    FailureKind,
    Measure,
    ReplyBody,
    Shutdown,
)
from cpkit.control.queue import Job
from cpkit.control.server import Server
from cpkit.group import init_context_parallel
from cpkit.sync.exchange import SymmetricMemoryError
from cpkit.worker.commands import (
    TICK_S,
    Begin,
    Command,
    CommandChannel,
    End,
    Leave,
    Step,
    StepResult,
    Tick,
)
from cpkit.worker.limits import check
from cpkit.worker.operations import Operation, RankState, operation

_log = logging.getLogger("cpkit")


class Executor:
    """Performs orders on this rank."""

    def __init__(self, orders: CommandChannel) -> None:
        self._orders = orders
        self._state = RankState()
        self._open: dict[int, Generator[Any, None, Any]] = {}

    def perform(self, order: Command) -> list[StepResult]:
        """Do it; everybody's outcome for a step, else nothing. Collective over the world."""
        if isinstance(order, Begin):
            self._state.round = order.job % 1000 + 1
            self._open[order.job] = self._steps(order.body)
        if isinstance(order, Begin | Step):
            return self._orders.gather(_advance(self._open[order.job]))
        if isinstance(order, End):
            for job in order.jobs:
                self._open.pop(job).close()
            if order.reset:
                self._state.reset()
        return []

    def follow(self) -> None:
        """Perform what rank 0 orders, until it says to leave."""
        while not isinstance(order := self._orders.receive(), Leave):
            self.perform(order)

    def _steps(self, body: Body) -> Generator[Any, None, Any]:
        """The reports of this rank; nothing at all from ranks outside the first group."""
        plan = operation(body)
        group = init_context_parallel(plan.cp_size())
        if group.index > 0:
            while True:
                yield None
        return (yield from plan.steps(group, self._state))


def _advance(steps: Generator[Any, None, Any]) -> StepResult:
    """One step, and how it went. A rank that fails still tells the others."""
    try:
        report, last = next(steps), False
    except StopIteration as end:
        report, last = end.value, True
    except (ValueError, SymmetricMemoryError) as error:
        _log.warning("%s: %s", type(error).__name__, error)
        return StepResult(error=str(error), agreed=True, bad_request=isinstance(error, ValueError))
    except Exception as error:  # noqa: BLE001 - whatever it is, the client hears of it
        _log.exception("a step failed")
        return StepResult(error=f"{type(error).__name__}: {error}")
    return StepResult(msgspec.msgpack.encode(report), last) if report is not None else StepResult()


class Task:
    """A job on rank 0: its operation, and the parts still to be run."""

    def __init__(self, body: Body) -> None:
        self.operation: Operation[Any] = operation(body)
        self.parts = deque(self.operation.parts())
        self.is_open = False


class Scheduler:
    """Rank 0's loop: whose turn it is, which order follows from it, and what the client is told."""

    def __init__(self, server: Server, orders: CommandChannel) -> None:
        self._server, self._turns, self._orders = server, server.turns, orders
        self._performer = Executor(orders)
        self._tasks: dict[int, Task] = {}

    def conduct(self) -> None:
        """Serve until a client says to shut down."""
        while True:
            job = self._turns.take(TICK_S)
            if job is None:
                self._give(Tick())
            elif job.cancelled:
                self._fail(job, "cancelled", "the measurement was cancelled")
            elif isinstance(job.body, Shutdown):
                self._server.tell(job, Done("all ranks leave"))
                self._give(Leave())
                return
            else:
                self._serve(job)

    def _serve(self, job: Job) -> None:
        """One step of a job."""
        if job.number not in self._tasks:
            try:
                check(job.body, self._orders.size)
            except ValueError as error:
                self._fail(job, "bad_request", str(error))
                return
            self._tasks[job.number] = Task(job.body)
        job.not_before = time.monotonic() + (
            job.body.interval_s if isinstance(job.body, Measure) else 0.0
        )
        self._take_step(job, self._tasks[job.number])

    def _take_step(self, job: Job, task: Task) -> None:
        order = Step(job.number) if task.is_open else Begin(job.number, task.parts[0])
        task.is_open = True
        outcomes = self._give(order)
        if any(outcome.error for outcome in outcomes):
            self._report_errors(job, outcomes[: operation(task.parts[0]).cp_size()])
            return
        if outcomes[0].last:
            task.parts.popleft()
            self._close([job.number])
        over = not task.parts
        for reply in self._collect(task, outcomes, over=over):
            self._server.tell(job, reply)
        if over:
            self._forget(job)
        elif job.is_overdue():
            self._fail(job, "cancelled", "its deadline is over")
        else:
            self._turns.put_back(job, front=not isinstance(job.body, Measure))

    def _collect(self, task: Task, outcomes: list[StepResult], *, over: bool) -> list[ReplyBody]:
        plan = task.operation
        reports = [
            msgspec.msgpack.decode(outcome.report, type=plan.report)
            for outcome in outcomes
            if outcome.report
        ]
        return list(plan.collect(reports, over=over))

    def _report_errors(self, job: Job, outcomes: list[StepResult]) -> None:
        """The lowest rank's words. Unless all ranks agreed to fail, everything starts afresh."""
        rank = next((r for r, outcome in enumerate(outcomes) if outcome.error), 0)
        first = outcomes[rank]
        if all(outcome.agreed for outcome in outcomes):
            kind: FailureKind = "bad_request" if first.bad_request else "internal"
            self._fail(job, kind, first.error)
        else:
            self._reset()
            self._fail(job, "internal", first.error, rank)

    def _reset(self) -> None:
        """Close every open job and drop all groups; measurements that were open begin again."""
        open_jobs = [number for number, task in self._tasks.items() if task.is_open]
        self._close(open_jobs, reset=True)

    def _fail(self, job: Job, kind: FailureKind, message: str, rank: int | None = None) -> None:
        self._server.tell(job, Failed(kind, message, rank))
        task = self._tasks.get(job.number)
        if task and task.is_open:
            self._close([job.number])
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._tasks.pop(job.number, None)
        self._turns.done()

    def _close(self, jobs: list[int], *, reset: bool = False) -> None:
        for number in jobs:
            self._tasks[number].is_open = False
        self._give(End(tuple(jobs), reset))

    def _give(self, order: Command) -> list[StepResult]:
        self._orders.give(order)
        return self._performer.perform(order)
