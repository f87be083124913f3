"""Heartbeats: which ranks run, as rank 0 and the other ranks see it, without the main threads.

    rank 1   thread: add 1 to its counter in the store, wait for the store's answer, sleep
    rank 0   thread: read all counters, sleep                (the store is in the process of rank 0)

A counter that grows shows rank 0 that the rank runs, and an answer shows the rank that rank 0 runs.
The threads send while the rank computes or waits in a collective. A stopped process sends nothing,
and neither does one on a machine that is lost.

    silent for one deadline    rank 0 fails all requests with an error that names the rank
    silent for two             rank 0 ends the workers
    rank 0 silent for one      the other ranks end the workers, because no rank can answer

A rank that continues before the first deadline costs nothing; before the second one, the workers
recover, and only the requests of that time have failed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import msgspec
import torch.distributed as dist

from cpkit.control.exit_report import last_lines
from cpkit.control.messages import Failed
from cpkit.control.runtime_dir import (
    Death,
    RuntimeDir,
    Worker,
    continue_agent,
    write_private,
)
from cpkit.control.server import Server
from cpkit.settings import deadline_s
from cpkit.worker.commands import CommandChannel

PEER_HUNG_CODE = 71
_LONGEST_PERIOD_S = 1.0
_log = logging.getLogger("cpkit")


def period_s() -> float:
    """Return the time between two heartbeats, in seconds."""
    return min(_LONGEST_PERIOD_S, deadline_s() / 10)


class Silence:
    """How long each counter has not grown, in seconds in which this process was running.

    The time in which this process was stopped too does not count.
    """

    def __init__(self, count: int) -> None:
        self._counters = [0] * count
        self._silent_s = [0.0] * count
        self._observed_s = time.monotonic()

    def observe(self, counters: Sequence[int]) -> list[float]:
        """Compare with the previous counters, and return the silence of each. Call it often."""
        now_s = time.monotonic()
        passed_s = min(now_s - self._observed_s, 2 * period_s())
        self._observed_s = now_s
        for number, counter in enumerate(counters):
            grows = counter != self._counters[number]
            self._silent_s[number] = 0.0 if grows else self._silent_s[number] + passed_s
        self._counters = list(counters)
        return list(self._silent_s)


def _heartbeats(store: dist.Store) -> dist.Store:
    """Return the part of the job's store that holds the counters."""
    return dist.PrefixStore("cpkit/heartbeats", store)


class Heartbeat:
    """The heartbeat of a rank other than 0, which watches rank 0. Two threads.

    The second one is needed because the first one waits forever for a store that does not answer.
    """

    def __init__(self, store: dist.Store, rank: int, runtime_dir: RuntimeDir) -> None:
        # A connection of its own: one that waits keeps other threads waiting.
        self._store = _heartbeats(store.clone())  # type: ignore[attr-defined]
        self._rank, self._runtime_dir = rank, runtime_dir
        self._first = msgspec.msgpack.decode(self._store.get("rank 0"), type=Worker)
        self._answers = 0
        self._ended = False

    def start(self) -> None:
        """Start both threads."""
        for run in (self._send, self._watch):
            threading.Thread(target=run, name="cpkit heartbeat", daemon=True).start()

    def _send(self) -> None:
        try:
            while True:
                self._store.add(f"{self._rank}", 1)
                self._answers += 1
                time.sleep(period_s())
        except RuntimeError:  # rank 0 has ended, which its agent and the main thread detect
            self._ended = True

    def _watch(self) -> None:
        silence = Silence(1)
        while not self._ended:
            silent_s = silence.observe([self._answers])[0]
            if silent_s >= deadline_s():
                cause = describe([self._first], silent_s, "", beats=False)
                end_workers([self._first], cause, self._runtime_dir)
            time.sleep(period_s())


class Monitor:
    """Rank 0's view of the other ranks: while one hangs, it sets the refusal of the server."""

    def __init__(
        self,
        store: dist.Store,
        channel: CommandChannel,
        workers: tuple[Worker, ...],
        server: Server,
        runtime_dir: RuntimeDir,
    ) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]
        self._channel, self._workers, self._server = channel, workers, server
        self._runtime_dir = runtime_dir
        self._silent: Failed | None = None  # no heartbeats
        self._late: Failed | None = None  # heartbeats, but no answer
        self._late_since_s = 0.0
        self._lock = threading.RLock()
        first = msgspec.msgpack.encode(workers[0])
        _heartbeats(self._store).set("rank 0", first)  # type: ignore[arg-type] # bytes are fine

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="cpkit monitor", daemon=True).start()

    def answered(self) -> None:
        """Withdraw `report_late`, because all ranks have answered the last command."""
        with self._lock:
            self._late = None
            self._update()

    def report_late(self, ranks: list[int], waited_s: float) -> None:
        """Report ranks that have not answered a command; end the workers if it lasts too long.

        The other ranks have answered. A late rank may itself wait for them, for one deadline, after
        it was stopped for some time.
        """
        workers, now_s = [self._workers[rank] for rank in ranks], time.monotonic()
        with self._lock:
            if not self._late:
                self._late_since_s = now_s
                what = describe(workers, waited_s, self._step(), beats=True)
                self._late = _refusal(what, 2 * deadline_s())
                self._update()
            elif now_s - self._late_since_s >= 2 * deadline_s():
                what = describe(workers, waited_s, self._step(), beats=True)
                end_workers(workers, what, self._runtime_dir)

    def _watch(self) -> None:
        others, store = self._workers[1:], _heartbeats(self._store)
        silence = Silence(len(others))
        try:
            while True:
                counters = [store.add(f"{worker.rank}", 0) for worker in others]
                with self._lock:
                    self._judge(silence.observe(counters))
                    if overdue_s := self._channel.overdue_s(self._store):
                        self.report_late([0], overdue_s)
                time.sleep(period_s())
        except RuntimeError:  # the store is closed: this rank ends
            return

    def _judge(self, silent_s: list[float]) -> None:
        """Act on the silence of the ranks 1, 2, …"""
        longest_s = max(silent_s, default=0.0)
        pairs = zip(self._workers[1:], silent_s, strict=True)
        hung = [worker for worker, each_s in pairs if each_s >= deadline_s()]
        if longest_s >= 2 * deadline_s():
            what = describe(hung, longest_s, self._step(), beats=False)
            end_workers(hung, what, self._runtime_dir)
        if hung and not self._silent:
            what = describe(hung, longest_s, self._step(), beats=False)
            self._silent = _refusal(what, deadline_s())
            self._update()
        elif self._silent and not hung:
            self._silent = None
            self._update()

    def _step(self) -> str:
        job = self._server.jobs.current()
        return type(job.body).__name__.lower() if job else ""

    def _update(self) -> None:
        """Set the refusal, and log it when it begins and when it ends."""
        before, now = self._server.refusal, self._silent or self._late
        self._server.refusal = now
        if now and not before:
            _log.warning("%s", now.message)
        elif before and not now:
            _log.warning("all ranks respond again")


def describe(workers: list[Worker], silent_s: float, step: str, *, beats: bool) -> str:
    """Name the ranks, for how long they have not responded, their step and their state.

    `beats`: their heartbeats arrive, but not their answers.
    """
    named = ", ".join(
        f"rank {worker.rank} (process {worker.process.pid} on {worker.host})" for worker in workers
    )
    verb = "has" if len(workers) == 1 else "have"
    what = f", during a step of `{step}`" if step else ""
    states = dict.fromkeys(_state(worker, beats=beats) for worker in workers)
    return f"{named} {verb} not responded for {silent_s:.0f} s{what}: {'; '.join(states)}"


def _state(worker: Worker, *, beats: bool) -> str:
    if worker.process.is_stopped():
        return "the process is stopped (state T)"
    if beats:
        return "the process runs, but its step does not end"
    if worker.process.is_running_here():
        return "the process runs, but it cannot be reached"
    return "the process is stopped, or its node cannot be reached"


def _refusal(what: str, remaining_s: float) -> Failed:
    return Failed(
        "hung",
        f"{what}. If this lasts for {remaining_s:g} s more, the workers end. `kill -CONT` "
        f"continues a stopped process; cpkit.connect() ends these workers and starts new ones. "
        f"CPKIT_DEADLINE_S sets this wait.",
    )


def end_workers(workers: list[Worker], cause: str, runtime_dir: RuntimeDir) -> NoReturn:
    """Record why the workers end, kill the ranks that are stopped here, and exit.

    The agent then ends the other ranks. A stopped process would delay it, because it acts on no
    signal but SIGKILL.
    """
    first = workers[0]
    _log.error("exiting: %s", cause)
    try:
        death = Death(first.rank, first.process.pid, None, cause, last_lines(first.log))
        write_private(runtime_dir.hang_file, death)
        for worker in workers:
            if worker.process.is_stopped():
                worker.process.send(signal.SIGKILL)
        continue_agent()
    finally:
        os._exit(PEER_HUNG_CODE)
