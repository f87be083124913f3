"""The command loop: rank 0 schedules the steps of waiting jobs, and every rank executes them.

A job is a generator of steps, so several jobs can be open at the same time. Their steps run in the
same order on all ranks, because rank 0 sends every step as a command.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from typing import Any

import msgspec
import torch.distributed as dist

from cpkit.control.messages import (
    Body,
    Done,
    Failed,
    FailureKind,
    Pool,
    Shutdown,
)
from cpkit.control.queue import Job
from cpkit.control.server import Server
from cpkit.group import init_context_parallel
from cpkit.os_errors import describe
from cpkit.sync.exchange import SymmetricMemoryError
from cpkit.worker.commands import (
    KEEP_ALIVE_S,
    Begin,
    Command,
    CommandChannel,
    End,
    Exit,
    KeepAlive,
    Step,
    StepResult,
)
from cpkit.worker.limits import (
    MemoryInUse,
    check,
    check_room,
    check_share,
    memory_limit_bytes,
    needed,
)
from cpkit.worker.liveness import Monitor
from cpkit.worker.operations import Operation, RankState, operation
from cpkit.worker.own_algorithms import raised_at

_NO_JOB = 0  # jobs have numbers from 1
_RETRY_S = 0.05
_log = logging.getLogger("cpkit")


class Executor:
    """Executes commands on this rank."""

    def __init__(self, channel: CommandChannel) -> None:
        self._channel = channel
        self.state = RankState()
        self._open: dict[int, Generator[Any, None, Any]] = {}

    def run(self) -> None:
        """On every rank but 0, execute commands until Exit."""
        command: Command = KeepAlive()
        while not isinstance(command, Exit):
            command = self._channel.receive()
            self._channel.answer(self.execute(command))

    def execute(self, command: Command) -> StepResult:
        """Execute a command, and return this rank's result; an empty one if it is not a step."""
        if isinstance(command, Begin):
            self.state.client = command.client
            self.state.round = command.job % 1000 + 1
            self._open[command.job] = self._steps(command.body)
        if isinstance(command, Begin | Step):
            return _run_step(self._open[command.job])
        if isinstance(command, End):
            for job in command.jobs:
                self._open.pop(job).close()
            if command.reset:
                self.state.reset()
        return StepResult()

    def _steps(self, body: Body) -> Generator[Any, None, Any]:
        """Yield the reports of this rank; on ranks outside the first group, None."""
        job_operation = operation(body)
        group = init_context_parallel(job_operation.cp_size())
        group.samples_pools = True
        if group.index > 0:
            while True:
                yield None
        return (yield from job_operation.steps(group, self.state))


def _run_step(steps: Generator[Any, None, Any]) -> StepResult:
    """Run one step. An exception becomes a result, so that every rank still answers."""
    try:
        report, last = next(steps), False
    except StopIteration as end:
        report, last = end.value, True
    except (ValueError, SymmetricMemoryError) as error:
        _log.warning("%s: %s", type(error).__name__, error)
        text = f"{error}{raised_at(error)}"
        return StepResult(error=text, agreed=True, bad_request=isinstance(error, ValueError))
    except Exception as error:  # noqa: BLE001 - every failure is reported to the client
        _log.exception("a step failed")
        text = f"{type(error).__name__}: {describe(error)}{raised_at(error)}"
        timed_out = isinstance(error, TimeoutError | dist.DistStoreError)
        # gloo raises RuntimeError for a timeout.
        return StepResult(error=text, timed_out=timed_out or "timed out" in text.lower())
    return StepResult(msgspec.msgpack.encode(report), last) if report is not None else StepResult()


def first_to_fail(results: list[StepResult]) -> int:
    """Return the lowest rank with an error, preferably one that did not wait for another rank."""
    failed = [rank for rank, result in enumerate(results) if result.error]
    return min(failed, key=lambda rank: (results[rank].timed_out, rank), default=0)


class Task:
    """A job on rank 0: its operation, its unfinished parts, and the memory that it needs."""

    def __init__(self, body: Body) -> None:
        self.needed_bytes = needed(body)
        self.operation: Operation[Any] = operation(body)
        self.parts = deque(self.operation.parts())
        self.is_open = False


class Scheduler:
    """Rank 0's loop: takes jobs from the queue, sends commands, and replies to clients."""

    def __init__(self, server: Server, channel: CommandChannel, monitor: Monitor) -> None:
        self._server, self._jobs, self._channel = server, server.jobs, channel
        self._monitor = monitor
        self._executor = Executor(channel)
        self._tasks: dict[int, Task] = {}

    def run(self) -> None:
        """Serve until a client requests Shutdown."""
        while True:
            job = self._jobs.take(KEEP_ALIVE_S)
            for client in self._jobs.departed():
                self._release(client)
            if job is None:
                self._execute(KeepAlive())
            elif job.cancelled:
                self._fail(job, "cancelled", "it was cancelled, or its replies were not read")
            elif isinstance(job.body, Shutdown):
                self._server.reply(job, Done("all ranks are exiting"))
                self._execute(Exit())
                return
            else:
                self._serve(job)

    def _serve(self, job: Job) -> None:
        """Check a new job, then run its next step."""
        if job.number not in self._tasks:
            try:
                check(job.body, self._channel.size)
                task = Task(job.body)
                if not self._has_room(job, task):
                    self._jobs.postpone(job, _RETRY_S)
                    return
            except ValueError as error:
                self._fail(job, "bad_request", str(error))
                return
            except MemoryInUse as error:
                self._fail(job, "busy", str(error))
                return
            self._tasks[job.number], job.postponed = task, False
        self._run_step(job, self._tasks[job.number])

    def _has_room(self, job: Job, task: Task) -> bool:
        """Return False while open requests use the memory that a new one needs.

        Raises ValueError or MemoryInUse if there will be no room when they have ended.
        """
        held = self._executor.state.held_bytes()
        if isinstance(job.body, Pool):
            check_share(job.body, job.client, held)
        in_use = sum(held.values())
        check_room(task.needed_bytes, in_use)
        others = sum(other.needed_bytes for other in self._tasks.values())
        return others == 0 or task.needed_bytes + others + in_use <= memory_limit_bytes()

    def _release(self, client: bytes) -> None:
        """Free what a client that has left holds."""
        for holder, cp_size in self._executor.state.held_bytes():
            if holder == client:
                results = self._execute(Begin(_NO_JOB, Pool(cp_size, "leave"), client))
                self._execute(End((_NO_JOB,)))
                if not all(result.agreed for result in results if result.error):
                    self._reset()

    def _run_step(self, job: Job, task: Task) -> None:
        began_s = time.monotonic()
        begin = Begin(job.number, task.parts[0], job.client)
        command = Step(job.number) if task.is_open else begin
        task.is_open = True
        results = self._execute(command)
        if any(result.error for result in results):
            self._report_errors(job, results[: operation(task.parts[0]).cp_size()])
            return
        if results[0].last:
            task.parts.popleft()
            self._close([job.number])
        over = not task.parts
        try:
            reports = [
                msgspec.msgpack.decode(result.report, type=task.operation.report)
                for result in results
                if result.report
            ]
        except msgspec.DecodeError as error:  # a user's algorithm returned something else
            self._fail(job, "internal", f"a rank's report is invalid: {error}")
            return
        for reply in task.operation.collect(reports, over=over):
            self._server.reply(job, reply)
        if over:
            self._remove(job)
        elif job.is_overdue():
            self._fail(job, "cancelled", f"its deadline of {job.request.deadline_s:g} s has passed")
        else:
            interval_s = task.operation.interval_s(reports[0])  # other jobs run until it has passed
            job.not_before = began_s + interval_s
            self._jobs.put_back(job, front=not interval_s)

    def _report_errors(self, job: Job, results: list[StepResult]) -> None:
        """Report one rank's error. Reset all ranks unless they agreed on the error."""
        rank = first_to_fail(results)
        first = results[rank]
        if all(result.agreed for result in results):
            kind: FailureKind = "bad_request" if first.bad_request else "internal"
            self._fail(job, kind, first.error)
        else:
            self._reset()
            self._fail(job, "internal", first.error, rank)

    def _reset(self) -> None:
        """Close every open job and drop all groups. Jobs in the queue start their part again."""
        open_jobs = [number for number, task in self._tasks.items() if task.is_open]
        self._close(open_jobs, reset=True)

    def _fail(self, job: Job, kind: FailureKind, message: str, rank: int | None = None) -> None:
        self._server.reply(job, Failed(kind, message, rank))
        task = self._tasks.get(job.number)
        if task and task.is_open:
            self._close([job.number])
        self._remove(job)

    def _remove(self, job: Job) -> None:
        self._tasks.pop(job.number, None)
        self._jobs.finish()

    def _close(self, jobs: list[int], *, reset: bool = False) -> None:
        for number in jobs:
            self._tasks[number].is_open = False
        self._execute(End(tuple(jobs), reset))

    def _execute(self, command: Command) -> list[StepResult]:
        """Send a command to all ranks, execute it on rank 0 too, and return one result per rank."""
        self._channel.send(command)
        self._channel.answer(self._executor.execute(command))
        results = self._channel.answers(self._monitor.report_late)
        self._monitor.answered()
        return results
