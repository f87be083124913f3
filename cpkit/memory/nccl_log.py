"""Which kernels NCCL selected, by name, from its log.

A path report (cpkit.memory.path) predicts the choice from the locations of the buffers. NCCL states
its choice only in its log, one line per collective:

    AllGather [Symmetric]: 65536 Bytes -> Kernel AllGather_ST nchannels 4 …        symmetric
    AllGather [Copy Engine]: 65536 Bytes -> cudaMemcpy; …                          copy engine
    AllGather: 65536 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..23}           fallback

Rank 0 of a communicator writes these lines; up to 2.27 every rank does. Source: NCCL 2.27.7 to
2.30.7, src/enqueue.cc and src/scheduler.

* For the log of a whole run, set the variables of `environment(file)` before the first collective,
  run, and use `count_file`. NCCL reads them once per process.
* In a running process, `observe(call)` switches the log on for one call, and off again. Nothing is
  logged before and after it, so other calls are not slowed down.

`observe` changes the variables and calls `ncclResetDebugInit`, after which NCCL reads them again.
NCCL exports this function, and says that it is no supported part of its interface; without it,
nothing is observed, and the reason says so. Source: NCCL's src/debug.cc, 2.28.9 to 2.30.7.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec

from cpkit.packing import describe_types

_LINE = re.compile(
    r"\b(?P<op>[A-Z]\w+?)(?: \[(?P<kind>Symmetric|Copy Engine|Hierarchical CE)\])?: "
    r"(?P<nbytes>\d+) Bytes -> (?P<choice>.*)"
)
_KERNEL = re.compile(r"Kernel (\w+) nchannels (\d+)")
_RING = re.compile(r"Algo (\w+) proto (\w+) channel\{Lo\.\.Hi\}=\{(\d+)\.\.(\d+)\}")


class Selection(msgspec.Struct, frozen=True):
    """NCCL's choice for one collective.

    `kernel` is its name, for example "AllGather_ST" or "RING LL". `channels` is the number of its
    blocks on a GPU, 0 for the copy engine. `nbytes` are those of one rank.
    """

    kind: Literal["symmetric", "copy engine", "fallback"]
    kernel: str
    channels: int
    nbytes: int

    def __str__(self) -> str:
        plural = "s" if self.channels > 1 else ""
        channels = f", {self.channels} channel{plural}" if self.channels else ""
        return f"{self.kind}: {self.kernel}{channels}, {self.nbytes} bytes per rank"


class Selections(msgspec.Struct, frozen=True):
    """NCCL's choices for one kind of collective, in order; `reason` says why there are none."""

    calls: tuple[Selection, ...] = ()
    reason: str = ""

    @property
    def symmetric(self) -> int:
        """How often NCCL selected a symmetric kernel."""
        return sum(call.kind == "symmetric" for call in self.calls)

    @property
    def copy_engine(self) -> int:
        """How often NCCL selected the copy engine."""
        return sum(call.kind == "copy engine" for call in self.calls)

    @property
    def fallback(self) -> int:
        """How often NCCL selected an ordinary kernel, such as its ring."""
        return sum(call.kind == "fallback" for call in self.calls)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the selected kernels, each one once, in order."""
        return tuple(dict.fromkeys(call.kernel for call in self.calls))

    def __str__(self) -> str:
        if not self.calls:
            return f"nothing observed: {self.reason or 'NCCL logged no such collective'}"
        times = Counter(map(str, self.calls))
        return "; ".join(f"{n} × {text}" if n > 1 else text for text, n in times.items())


def environment(log: Path) -> dict[str, str]:
    """Return the variables to set before NCCL starts, so that it writes its selections to `log`.

    Each process writes its own file, `log` with its process id appended: NCCL truncates its file
    when it opens it, so two ranks with one file would overwrite each other's lines.
    """
    return {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "TUNING,REG,INIT",
        "NCCL_DEBUG_FILE": f"{log}.%p",
    }


def count(lines: Iterable[str], operation: str = "AllGather") -> Selections:
    """Return the selections for one collective in lines of NCCL's log.

    >>> str(count(["NCCL INFO AllGather: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..3}"]))
    'fallback: RING LL, 4 channels, 8 bytes per rank'
    """
    found = (match for line in lines if (match := _LINE.search(line)) and match["op"] == operation)
    return Selections(tuple(map(_selection, found)))


def count_file(log: Path, operation: str = "AllGather") -> Selections:
    """Return the selections in the logs of all processes; none without a log."""
    files = sorted(log.parent.glob(f"{log.name}.*"))
    return count(
        (line for file in files for line in file.read_text(errors="replace").splitlines()),
        operation,
    )


def observe(call: Callable[[], object], operation: str = "AllGather") -> Selections:
    """Call with NCCL's log switched on, and return what NCCL selected meanwhile. Local.

    `call` is called once in any case. It returns after its collectives have been launched; replays
    of a CUDA graph select nothing. The log is a temporary file of this process, removed at the end.
    """
    reset = _reset_function()
    if reset is None:
        call()
        return Selections(
            reason="no NCCL library with ncclResetDebugInit is loaded here; set the variables of "
            "cpkit.memory.nccl_log.environment(file) before the start instead"
        )
    if os.environ.get("NCCL_DEBUG_FILE"):
        call()
        return Selections(reason="NCCL_DEBUG_FILE is set, and NCCL would overwrite that file")
    with TemporaryDirectory(prefix="cpkit-nccl-") as directory:
        log = Path(directory) / "log"
        with _variables(environment(log), reset):
            call()
        return count_file(log, operation)


def keep_silent() -> None:
    """Set the variables of the log to values that switch it off, unless a user has set them.

    Call it before NCCL starts. `observe` then only replaces variables, which is safe while other
    threads read some: adding one can move the list under them.
    """
    if not os.environ.get("NCCL_DEBUG"):
        os.environ["NCCL_DEBUG"] = "VERSION"
        os.environ["NCCL_DEBUG_SUBSYS"] = ""
    os.environ.setdefault("NCCL_DEBUG_FILE", "")


def _reset_function() -> Callable[[], object] | None:
    """Return the loaded NCCL's ncclResetDebugInit, or None."""
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        return library.ncclResetDebugInit
    except (OSError, AttributeError):
        return None


@contextmanager
def _variables(values: dict[str, str], reset: Callable[[], object]) -> Iterator[None]:
    """Let NCCL read these variables, and at the end those from before again."""
    before = dict(os.environ)
    os.environ.update(values)
    reset()
    try:
        yield
    finally:
        for name in values:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
        reset()


def _selection(line: re.Match[str]) -> Selection:
    nbytes, choice = int(line["nbytes"]), line["choice"]
    if line["kind"] == "Symmetric":
        kernel = _KERNEL.match(choice)
        name, channels = (kernel[1], int(kernel[2])) if kernel else (choice, 0)
        return Selection("symmetric", name, channels, nbytes)
    if line["kind"]:
        return Selection("copy engine", choice.partition(";")[0], 0, nbytes)
    ring = _RING.match(choice)
    if ring:
        channels = int(ring[4]) - int(ring[3]) + 1
        return Selection("fallback", f"{ring[1]} {ring[2]}", channels, nbytes)
    return Selection("fallback", choice, 0, nbytes)


describe_types(Selections)
