"""`python -m benchmarks.load`: many clients of one set of workers, each with mixed requests.

    python -m benchmarks.load --record           # 10 minutes; writes results/DATE-load.json
    python -m benchmarks.load --soak --record    # an hour; clients pause, leave and come back

Every request must be answered, or refused with a reason. The results of requests that a client
sends at once must arrive in their order. Prints how long each kind took, how many requests the
slowest client could make, and what the ranks, their agent and the clients held in each minute.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import psutil

import cpkit
from benchmarks.launch import RESULTS, ROOT, say
from cpkit.control.client import request_deadline_s
from cpkit.control.messages import (
    Gather,
    Progress,
    Queued,
    Reply,
    Request,
    Workload,
    decode,
    encode,
)
from cpkit.processes import run_command
from cpkit.timing import percentile

COMMAND = "python -m benchmarks.load"
RANKS, PROCESSES, BURST = 2, 5, 6
GROWS = ("memory_mb", "agent_memory_mb", "clients_memory_mb", "descriptors", "threads", "segments")
PAUSE_S, VISIT = 2.0, 40  # of a soak: the mean pause, and the requests of a client's visit
SMALL = {"heads": 1, "head_dim": 16}


class Client:
    """One notebook: a `Lab` of its own, and a thread that sends one request after the other."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.rng = name, random.Random(seed)
        self.took_s: defaultdict[str, list[float]] = defaultdict(list)
        self.refused: Counter[str] = Counter()
        self.problems: list[str] = []
        self.connect()
        self.kinds: dict[str, tuple[Callable[[], object], float]] = {
            "status": (self.status, 8),
            "gather": (self.gather, 4),
            "measure": (self.measure, 2),
            "burst": (self.burst, 1),
            "sweep": (self.sweep, 1),
            "clock": (lambda: self.lab.clock(["direct"], [256], iterations=5), 1),
            "trace": (lambda: self.lab.trace([256], **SMALL), 1),
            "explain": (lambda: self.lab.explain([256]), 1),
            "abandon": (self.abandon, 1),
            "invalid": (self.invalid, 1),
        }

    def connect(self) -> None:
        """Become a client of the workers."""
        self.lab = cpkit.connect(self.name, launch=False)
        self.lab._client.on_wait = None  # no message per request that waits

    def run(self, end_s: float, soak: bool) -> None:
        """Send each kind of request, then random ones until the time is over.

        In a soak, pause between requests, and reconnect now and then.
        """
        names, weights = list(self.kinds), [weight for _, weight in self.kinds.values()]
        for number in count():
            if soak:
                left_s = max(0.0, end_s - time.monotonic())
                time.sleep(min(self.rng.expovariate(1 / PAUSE_S), left_s))
            if time.monotonic() >= end_s:
                break
            if soak and number % VISIT == VISIT - 1:
                self.lab.close()
                self.connect()
            is_first = number < len(names)  # which imports modules here, and fills caches there
            kind = names[number] if is_first else self.rng.choices(names, weights)[0]
            start_s = time.monotonic()
            try:
                self.kinds[kind][0]()
            except (cpkit.WorkersBusy, cpkit.BadRequest) as error:
                if str(error):
                    self.refused[f"{kind}: {type(error).__name__}"] += 1
                    continue
                self.problems.append(f"{kind} was refused without a reason")
            except Exception as error:  # noqa: BLE001 - every failure is reported
                self.problems.append(f"{kind}: {type(error).__name__}: {error!s:.300}")
                if isinstance(error, cpkit.WorkersDied):
                    break
            else:
                self.took_s[kind].append(time.monotonic() - start_s)
        self.lab.close()

    def status(self) -> None:
        """Ask for the state of the workers, which is answered at once."""
        self.lab.status()

    def gather(self) -> None:
        """Gather a random batch, and check that every row is right."""
        lengths = [self.rng.randrange(8, 300) for _ in range(self.rng.randrange(1, 4))]
        algorithm = self.rng.choice(("padded", "padded_symm", "direct"))
        if not self.lab.gather(lengths, algorithm=algorithm, **SMALL).verified:
            raise AssertionError("a row is wrong")

    def measure(self) -> None:
        """Stream three samples."""
        samples = list(self.lab.measure([256], samples=3, interval_s=0.02, **SMALL))
        if len(samples) != 3:
            raise AssertionError(f"3 samples were requested, and {len(samples)} arrived")

    def sweep(self) -> None:
        """Measure a small table."""
        self.lab.sweep(lengths=[[128]], cp_sizes=[RANKS], iterations=2, **SMALL)

    def abandon(self) -> None:
        """Leave a stream after its first sample, as an interrupted cell does."""
        samples = self.lab.measure([256], interval_s=0.02, **SMALL)
        next(samples)
        samples.close()

    def invalid(self) -> None:
        """Send what must be refused."""
        self.lab.gather([-1])
        raise AssertionError("lengths of -1 were accepted")

    def burst(self) -> None:
        """Send several requests at once, and check that their results arrive in order."""
        client = self.lab._client
        socket = client._take_socket()
        body = Gather(Workload(RANKS, (64,), heads=1, head_dim=16))
        sent = [f"{number}-{uuid.uuid4().hex}" for number in range(BURST)]
        for name in sent:
            socket.send(encode(Request(name, request_deadline_s(), body)))
        results: list[str] = []
        end_s = time.monotonic() + request_deadline_s()
        while len(results) < BURST and time.monotonic() < end_s:
            data = socket.receive(100)
            reply = decode(data, Reply) if data else None
            if reply and reply.id in sent and not isinstance(reply.body, Queued | Progress):
                results.append(reply.id)
        client._keep_socket(socket)
        if results != sent:
            numbers = [name.partition("-")[0] for name in results]
            raise AssertionError(f"the results of {BURST} requests arrived as {numbers}")


def clients(name: str, seed: int, number: int, end_s: float, soak: bool) -> None:
    """Run several clients in this process, and print what they did."""
    each = [Client(name, seed + index) for index in range(number)]
    threads = [threading.Thread(target=client.run, args=(end_s, soak)) for client in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [
        {"took_s": client.took_s, "refused": client.refused, "problems": client.problems}
        for client in each
    ]
    print(json.dumps(done))


def held(processes: list[psutil.Process], prefix: str = "") -> dict[str, float]:
    """Return what these processes hold together. Memory that they share counts once."""
    proportional_kb, segments = 0, set[str]()
    for process in processes:
        proc = Path(f"/proc/{process.pid}")
        for line in (proc / "smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):  # not files: others map them too
                proportional_kb += int(line.split()[1])
        maps = (proc / "maps").read_text().splitlines()
        segments.update(line.split()[5] for line in maps if "/dev/shm/cpkit-" in line)
    return {
        f"{prefix}memory_mb": round(proportional_kb * 1024 / 1e6, 1),
        f"{prefix}descriptors": sum(process.num_fds() for process in processes),
        f"{prefix}threads": sum(process.num_threads() for process in processes),
        f"{prefix}segments": len(segments),
    }


def watch(ranks: list[int], clients: list[int], end_s: float) -> list[dict[str, float]]:
    """Return what the ranks, their agent and the clients hold, once per minute until they end."""
    processes = [psutil.Process(pid) for pid in ranks]
    agent, found = processes[0].parent(), list[dict[str, float]]()
    while (left_s := end_s - time.monotonic()) > 1:
        time.sleep(min(60.0, left_s - 1))
        by_clients = held([psutil.Process(pid) for pid in clients], "clients_")
        by_agent = held([agent] if agent else [], "agent_")
        found.append(held(processes) | by_agent | by_clients)
        say(f"minute {len(found)}: {found[-1]}")
    return found


def summary(done: list[dict[str, Any]], by_minute: list[dict[str, float]]) -> dict[str, Any]:
    """Return the figures of all clients."""
    took: defaultdict[str, list[float]] = defaultdict(list)
    refused: Counter[str] = Counter()
    for client in done:
        refused.update(client["refused"])
        for kind, seconds in client["took_s"].items():
            took[kind] += seconds
    answered = [sum(map(len, client["took_s"].values())) for client in done]
    return {
        "clients": len(done),
        "answered": sum(answered),
        "refused": dict(sorted(refused.items())),
        "problems": [problem for client in done for problem in client["problems"]],
        "fewest_of_a_client": min(answered),
        "most_of_a_client": max(answered),
        "seconds": {
            kind: {
                "count": len(seconds),
                "p50": round(percentile(seconds, 50), 4),
                "p99": round(percentile(seconds, 99), 4),
                "max": round(max(seconds), 4),
            }
            for kind, seconds in sorted(took.items())
        },
        "by_minute": by_minute,
        "growth": {
            name: round(
                by_minute[-1][name] / by_minute[0][name] - 1, 4
            )  # the first minute warms up
            for name in GROWS
        },
    }


def run(number: int, minutes: float, seed: int, soak: bool) -> dict[str, Any]:
    """Start workers and clients, and return the figures."""
    name = f"load-{uuid.uuid4().hex[:8]}"
    with cpkit.connect(name, nproc=RANKS) as lab:
        ranks = [worker.pid for worker in lab.status().workers]
        end_s = time.monotonic() + 60 * minutes
        numbers = [number // PROCESSES + (n < number % PROCESSES) for n in range(PROCESSES)]
        command = [sys.executable, "-m", "benchmarks.load", "--name", name]
        command += ["--soak"] if soak else []
        processes = [
            subprocess.Popen(
                [*command, f"--seed={seed + 100 * n}", f"--clients={share}", f"--end={end_s}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for n, share in enumerate(numbers)
            if share
        ]
        try:
            by_minute = watch(ranks, [process.pid for process in processes], end_s)
            done = [json.loads(process.communicate(timeout=180)[0]) for process in processes]
        finally:
            for process in processes:
                process.kill()
        status = lab.status()
        figures = summary([client for clients in done for client in clients], by_minute)
        if status.state != "idle" or [worker.pid for worker in status.workers] != ranks:
            figures["problems"].append(f"after the clients have left: {status.state}")
        lab.stop()
    return figures


def main() -> int:
    """Run the command, and return its exit code: 1 if a request failed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Many clients with mixed requests.")
    parser.add_argument("--clients", type=int, help="how many (default: 20; of a soak: 5)")
    parser.add_argument("--minutes", type=float, help="how long (default: 10; of a soak: 60)")
    parser.add_argument("--soak", action="store_true", help="clients pause, leave and come back")
    parser.add_argument("--seed", type=int, default=1, help="of the requests (default: 1)")
    parser.add_argument("--record", action="store_true", help=f"write a file into {RESULTS}")
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    number, soak = options.clients or (5 if options.soak else 20), options.soak
    if options.name:
        clients(options.name, options.seed, number, options.end, soak)
        return 0
    from benchmarks.machine import environment  # imports torch

    minutes = options.minutes or (60.0 if soak else 10.0)
    command = f"{COMMAND} {'--soak ' if soak else ''}--clients {number} --minutes {minutes:g}"
    where = environment(f"{command} --seed {options.seed}")
    done = run(number, minutes, options.seed, soak)
    say(json.dumps(done, indent=1))
    if options.record:
        file = RESULTS / f"{where['date']}-{'soak' if soak else 'load'}.json"
        content = {"environment": where | {"minutes": minutes, "ranks": RANKS}, **done}
        file.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if done["problems"] else 0


if __name__ == "__main__":
    run_command(main)
