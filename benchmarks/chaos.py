"""`python -m benchmarks.chaos`: inject random faults, and check that each one is survived.

    python -m benchmarks.chaos --record          # writes benchmarks/results/DATE-chaos-SEED.json
    python -m benchmarks.chaos --seed 1234567    # the same faults again

After each fault: the error arrives within its deadline and names the cause, the next
`cpkit.connect()` gathers right rows, and no process, socket or segment is left. The runtime
directory and the shared memory are small file systems of this command's own (`unshare --mount`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

import cpkit
from benchmarks.launch import RESULTS, ROOT, say
from cpkit.control import launcher
from cpkit.control.errors import ControlError
from cpkit.control.runtime_dir import RuntimeDir
from cpkit.processes import run_command

COMMAND = "python -m benchmarks.chaos"
NAME, RANKS, DEADLINE_S = "chaos", 2, 2.0
SOON_S = 3 * DEADLINE_S + 10.0  # of a loaded machine
MOUNTS = {"runtime": "8m", "shm": "192m", "tmp": "64m"}
CLIENT = """
import cpkit, sys, time
lab = cpkit.connect("chaos", nproc=2)
print(lab.owned, *(worker.pid for worker in lab.status().workers), flush=True)
if sys.argv[1] == "measure":
    for sample in lab.measure([4096], 2, interval_s=0.01):
        print("sample", flush=True)
time.sleep(600)
"""


class NotSurvived(Exception):
    """A fault had another effect than it should have."""


class Scene:
    """The workers before a fault, and the load on them while it is injected."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.lab = cpkit.connect(NAME, nproc=RANKS)
        self.ranks = [worker.pid for worker in self.lab.status().workers]
        self.agent = _agent()
        self.error_s = 0.0  # from the fault to its error

    def rank(self) -> int:
        """Return a random rank."""
        return self.rng.randrange(RANKS)

    def one_of(self, *names: str) -> signal.Signals:
        """Return a random signal of these."""
        return signal.Signals[self.rng.choice(names)]

    def fails(self, kinds: Any, words: str, inject: Callable[[], object]) -> None:
        """Inject a fault, at a random time of a request, and check the error of the requests."""
        begun, outcome = threading.Event(), list[Exception]()
        user = threading.Thread(target=self._use, args=(begun, outcome), daemon=True)
        if self.rng.random() < 0.3:  # while the workers are idle
            inject()
            start_s = time.monotonic()
            user.start()
        else:
            user.start()
            begun.wait(SOON_S)
            time.sleep(self.rng.random() / 4)
            inject()
            start_s = time.monotonic()
        user.join(SOON_S)
        self.error_s = time.monotonic() - start_s
        if not outcome:
            raise NotSurvived(f"no error within {SOON_S:g} s; expected {words}")
        check(outcome[0], kinds, words)

    def _use(self, begun: threading.Event, outcome: list[Exception]) -> None:
        end_s = time.monotonic() + SOON_S
        try:
            while time.monotonic() < end_s:
                for _ in self.lab.measure([4096], RANKS, samples=3, interval_s=0.01):
                    begun.set()
                self.lab.gather([64, 9], RANKS, heads=1, head_dim=8)
                self.lab.status()
        except Exception as error:  # noqa: BLE001 - `fails` examines it
            outcome.append(error)

    def goes_on(self) -> None:
        """Check that the same workers serve this client."""
        if not self.lab.gather([64, 9], RANKS, heads=1, head_dim=8).verified:
            raise NotSurvived("a gather is wrong")
        if [worker.pid for worker in self.lab.status().workers] != self.ranks:
            raise NotSurvived("the ranks are others")


def check(error: Exception, kinds: Any, words: str) -> None:
    """Check that an error is of one of these kinds, and that its words match."""
    if not isinstance(error, kinds) or not re.search(words, str(error), re.DOTALL):
        raise NotSurvived(f"{type(error).__name__}: {error} (expected {words})")


def a_rank_dies(scene: Scene) -> None:
    """Of a signal, at any time."""
    number, rank = scene.one_of("SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "SIGHUP"), scene.rank()
    words = rf"^rank {rank} \(pid {scene.ranks[rank]}\).*{number.name}.*connect\(\) starts"
    scene.fails(cpkit.WorkersDied, words, lambda: os.kill(scene.ranks[rank], number))


def the_agent_is_killed(scene: Scene) -> None:
    """Without a chance to write a post-mortem."""
    words = "the agent of the workers has ended"
    scene.fails(cpkit.WorkersDied, words, lambda: os.kill(scene.agent, signal.SIGKILL))


def the_agent_is_terminated(scene: Scene) -> None:
    """By a signal on which it ends the ranks."""
    number = scene.one_of("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    words = f"have ended: the agent received {number.name}; cpkit.connect"
    scene.fails(cpkit.WorkersDied, words, lambda: os.kill(scene.agent, number))


def a_rank_dies_and_the_agent_is_stopped(scene: Scene) -> None:
    """The agent must be continued to report the death."""
    rank = scene.rank()

    def inject() -> None:
        os.kill(scene.agent, signal.SIGSTOP)
        os.kill(scene.ranks[rank], signal.SIGKILL)

    scene.fails(cpkit.WorkersDied, rf"^rank {rank} .*SIGKILL", inject)


def a_rank_pauses(scene: Scene) -> None:
    """Shorter than the deadline: it costs nothing."""
    pid = scene.rng.choice([*scene.ranks, scene.agent])
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(DEADLINE_S / 4, os.kill, (pid, signal.SIGCONT))
    timer.start()
    scene.goes_on()
    timer.join()
    scene.goes_on()


def a_rank_is_stopped_and_continued(scene: Scene) -> None:
    """Longer than the deadline: an error, and the workers recover."""
    stopped = scene.ranks[1]  # stopping rank 0 ends the workers
    words = rf"rank 1 \(process {stopped} .*has not responded .*stopped"
    try:
        scene.fails(cpkit.NoAnswer, words, lambda: os.kill(stopped, signal.SIGSTOP))
    finally:
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: scene.lab.status().state == "idle", "the ranks to recover")
    scene.goes_on()


def a_rank_stays_stopped(scene: Scene) -> None:
    """The next `connect` replaces the workers."""
    rank = scene.rank()
    words = rf"rank {rank} \(process {scene.ranks[rank]} .*(has|does) not respond"
    kinds = (cpkit.NoAnswer, cpkit.WorkersDied)
    scene.fails(kinds, words, lambda: os.kill(scene.ranks[rank], signal.SIGSTOP))


def the_owner_dies(scene: Scene) -> None:
    """Another notebook, which uses the same workers, learns why they end."""
    scene.lab.stop()
    with client("idle") as owner:
        line = owner.stdout.readline().split() if owner.stdout else []
        if line[:1] != ["True"]:
            raise NotSurvived(f"the owner said {line}")
        scene.__init__(scene.rng)  # type: ignore[misc]
        words = rf"process {owner.pid} .*which started them, has ended"
        scene.fails(cpkit.WorkersDied, words, owner.kill)


def a_client_dies_in_mid_stream(scene: Scene) -> None:
    """Its request ends, and others are served."""
    with client("measure") as other:
        for _ in range(3 + scene.rng.randrange(20)):
            if other.stdout:
                other.stdout.readline()
        other.kill()
    scene.goes_on()
    wait_until(lambda: scene.lab.status().state == "idle", "the dead client's request to end")


def the_workers_are_stopped_by_another_process(scene: Scene) -> None:
    """The error names that process."""
    command = [sys.executable, "-m", "cpkit", "stop", "--name", NAME]
    words = "have ended: process .*stop --name chaos.*stopped them"

    def inject() -> None:
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)

    scene.fails(cpkit.WorkersDied, words, inject)


def two_processes_start_the_same_name(scene: Scene) -> None:
    """One starts the workers, and both use them."""
    scene.lab.stop()
    with client("idle") as one, client("idle") as two:
        lines = [each.stdout.readline().split() for each in (one, two) if each.stdout]
        one.kill()
        two.kill()
    if sorted(line[0] for line in lines) != ["False", "True"] or lines[0][1:] != lines[1][1:]:
        raise NotSurvived(f"one must own the workers of both: {lines}")


def descriptors_run_out(scene: Scene) -> None:
    """The server has its clients, so it goes on; a new segment and a new client are refused."""
    scene.goes_on()  # the first gather of new workers needs descriptors itself
    rank = scene.rank()
    pid = scene.ranks[rank]
    limit = psutil.Process(pid).num_fds() + scene.rng.randrange(12)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        scene.goes_on()
        expect_refusal(scene, rf"rank {rank}: too many open files: .*limit .* {limit}")
        if rank == 0:
            try:
                cpkit.connect(NAME, launch=False).close()
            except cpkit.NoAnswer as error:
                check(error, cpkit.NoAnswer, "rank 0 has too many open files")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    scene.goes_on()


def memory_runs_out(scene: Scene) -> None:
    """The rank without memory is named, and not the one that waits for it."""
    rank = scene.rank()
    process = psutil.Process(scene.ranks[rank])
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + (8 << 20), -1))
    start_s = time.monotonic()
    try:
        scene.lab.gather([60_000], RANKS, algorithm="padded", heads=1)
        raise NotSurvived("a gather needed no memory")
    except (cpkit.RequestFailed, cpkit.BadRequest) as error:
        scene.error_s = time.monotonic() - start_s
        check(error, Exception, rf"^rank(\(s\))? {rank}: .*(memory|allocate)")
    finally:
        process.rlimit(psutil.RLIMIT_AS, (-1, -1))
    scene.goes_on()


def shared_memory_is_full(scene: Scene) -> None:
    """A larger arena is refused, and the old one is used again."""
    with filled(Path(os.environ["CPKIT_SHM_DIR"])):
        expect_refusal(scene, "full|does not fit|not fit")
    scene.goes_on()


def the_runtime_directory_is_full(scene: Scene) -> None:
    """Workers do not start, and say why."""
    scene.lab.stop()
    with filled(Path(os.environ["JUPYTER_RUNTIME_DIR"])):
        try:
            cpkit.connect(NAME, nproc=RANKS)
            raise NotSurvived("workers started in a full runtime directory")
        except ControlError as error:
            check(error, ControlError, "No space left.*set JUPYTER_RUNTIME_DIR")


# One round: each fault that ends the workers once, and the others, which are quicker, twice.
FAULTS = (
    a_rank_dies,
    the_agent_is_killed,
    the_agent_is_terminated,
    a_rank_dies_and_the_agent_is_stopped,
    a_rank_stays_stopped,
    the_owner_dies,
    the_workers_are_stopped_by_another_process,
    two_processes_start_the_same_name,
    the_runtime_directory_is_full,
    *(
        a_rank_pauses,
        a_rank_is_stopped_and_continued,
        a_client_dies_in_mid_stream,
        descriptors_run_out,
        memory_runs_out,
        shared_memory_is_full,
    )
    * 2,
)


def expect_refusal(scene: Scene, words: str) -> None:
    """Check that no rank makes a larger arena, and that the error has these words."""
    start_s = time.monotonic()
    try:
        scene.lab.pool.configure((16 + scene.rng.randrange(16)) << 20, RANKS)
        raise NotSurvived(f"no error; expected {words}")
    except (cpkit.RequestFailed, cpkit.BadRequest) as error:
        scene.error_s = time.monotonic() - start_s
        check(error, Exception, words)


@contextmanager
def filled(directory: Path) -> Iterator[None]:
    """Fill a file system; empty it again at the end."""
    filler = directory / "filler"
    try:
        with filler.open("wb", 0) as file, suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass
        yield
    finally:
        filler.unlink()


@contextmanager
def client(action: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that connects to the workers, and kill it at the end."""
    command = [sys.executable, "-c", CLIENT, action]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], why: str) -> None:
    """Wait for a condition. Raises NotSurvived after SOON_S."""
    end_s = time.monotonic() + SOON_S
    while not condition():
        if time.monotonic() > end_s:
            raise NotSurvived(f"waited {SOON_S:g} s for {why}")
        time.sleep(0.05)


def _agent() -> int:
    agent = RuntimeDir(NAME).agent()
    if agent is None:
        raise NotSurvived("there is no agent")
    return agent.process.pid


def left_over() -> list[str]:
    """Return the processes, sockets and segments that are not those of the running workers."""
    here = os.environ["JUPYTER_RUNTIME_DIR"]
    agent = RuntimeDir(NAME).agent()
    running = {agent.process.pid} if agent and RuntimeDir(NAME).is_locked() else set()
    sockets = {agent.socket_dir} if running and agent else set()
    found = [str(path) for path in Path(os.environ["CPKIT_SHM_DIR"]).glob("cpkit*")]
    found += [str(path) for path in Path(os.environ["TMPDIR"]).glob("cpkit-*")]
    left = [path for path in found if path not in sockets]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("JUPYTER_RUNTIME_DIR") == here
            words = " ".join(process.cmdline())
            ours &= "cpkit.worker.rank" in words or "cpkit.control.agent" in words
            if ours and not running & {process.pid, process.ppid()}:
                left.append(f"process {process.pid}: {words:.60}")
    return left


def run_fault(inject: Callable[[Scene], None], rng: random.Random) -> tuple[float, str]:
    """Inject one fault; return the seconds to its error, and how it was not survived or ""."""
    scene = None
    try:
        scene = Scene(rng)
        inject(scene)
        scene.lab.close()
        with cpkit.connect(NAME, nproc=RANKS) as lab:
            if not lab.gather([64, 9], RANKS, heads=1, head_dim=8).verified:
                raise NotSurvived("a gather after the fault is wrong")
        wait_until(lambda: not left_over(), "no process, socket or segment to be left")
    except NotSurvived as failure:
        return scene.error_s if scene else 0.0, f"{failure} {left_over() or ''}"
    except Exception as error:  # noqa: BLE001 - every failure is reported
        return 0.0, f"{type(error).__name__}: {error}"
    return scene.error_s, ""


def run(faults: int, seed: int, stop_at: float) -> dict[str, Any]:
    """Inject faults until there are enough, or until time is over; return what happened."""
    by_kind: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    for number in count():
        if number >= faults or time.monotonic() > stop_at:
            break
        rng = random.Random(f"{seed}/{number}")
        # One round in a random order, then the next one.
        order = random.Random(f"{seed}/{number // len(FAULTS)}").sample(FAULTS, len(FAULTS))
        inject = order[number % len(FAULTS)]
        start_s = time.monotonic()
        error_s, problem = run_fault(inject, rng)
        took_s = time.monotonic() - start_s
        kind = by_kind.setdefault(inject.__name__, {"injected": 0, "slowest_error_s": 0.0})
        kind["injected"] += 1
        kind["slowest_error_s"] = max(kind["slowest_error_s"], round(error_s, 2))
        say(f"{number:4} {inject.__name__}: error after {error_s:.1f} s, {took_s:.1f} s {problem}")
        if problem:
            failures.append({"number": number, "fault": inject.__name__, "problem": problem})
    injected = sum(kind["injected"] for kind in by_kind.values())
    return {
        "seed": seed,
        "injected": injected,
        "survived": injected - len(failures),
        "slowest_error_s": max((k["slowest_error_s"] for k in by_kind.values()), default=0.0),
        "by_kind": dict(sorted(by_kind.items())),
        "failures": failures,
    }


def main() -> int:
    """Run the command, and return its exit code: 1 if a fault was not survived."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Inject random faults.")
    parser.add_argument("--faults", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, help="of an earlier run (default: a random one)")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start no fault after this time (default: 60)"
    )
    parser.add_argument("--record", action="store_true", help=f"write a file into {RESULTS}")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        return _run_inside(sys.argv[1:])
    _prepare(Path(options.inside))
    from benchmarks.machine import environment  # imports torch

    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    where = environment(f"{COMMAND} --faults {options.faults} --seed {seed}")
    say(f"seed {seed}; the deadline of a rank is {DEADLINE_S:g} s")
    start_s = time.monotonic()
    try:
        done = run(options.faults, seed, start_s + 60 * options.minutes)
    finally:
        launcher.stop(NAME)
    done |= {"left_over": left_over(), "took_s": round(time.monotonic() - start_s)}
    print(
        f"{done['survived']} of {done['injected']} faults survived; left over {done['left_over']}"
    )
    if options.record:
        file = RESULTS / f"{where['date']}-chaos-{seed}.json"
        limits = {"deadline_s": DEADLINE_S, "ranks": RANKS}
        file.write_text(json.dumps({"environment": where | limits, **done}, indent=1) + "\n")
    return 0 if done["survived"] == done["injected"] and not done["left_over"] else 1


def _run_inside(arguments: list[str]) -> int:
    """Run this command with small file systems of its own, which end with it."""
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    mounts = "".join(
        f'mkdir "$0/{name}" && mount -t tmpfs -o mode=700,size={size} tmpfs "$0/{name}" && '
        for name, size in MOUNTS.items()
    )
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--mount", "sh", "-c", f'{mounts} exec "$@"', str(directory)]
    command += [sys.executable, "-m", "benchmarks.chaos", *arguments, "--inside", str(directory)]
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _prepare(directory: Path) -> None:
    os.environ["JUPYTER_RUNTIME_DIR"] = str(directory / "runtime")
    os.environ["CPKIT_SHM_DIR"] = str(directory / "shm")
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory / "tmp")
    os.environ["CPKIT_DEADLINE_S"] = f"{DEADLINE_S}"


if __name__ == "__main__":
    run_command(main)
