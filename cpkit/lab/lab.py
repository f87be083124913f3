"""`Lab`: a notebook's view of a set of workers. Each call is one request over the socket."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Sequence
from itertools import product
from operator import index
from typing import TYPE_CHECKING, Literal, TypedDict

import msgspec

from cpkit.algorithms import ALGORITHMS, AlgorithmName
from cpkit.control import launcher
from cpkit.control.client import DEADLINE_S, Client
from cpkit.control.complaints import unknown_options
from cpkit.control.errors import BadRequest
from cpkit.control.messages import (
    Explain,
    ExplainResult,
    Gather,
    GatherResult,
    Measure,
    Put,
    PutResult,
    Sample,
    Status,
    StatusResult,
    Strategy,
    Sweep,
    SweepResult,
    Trace,
    TraceResult,
    Workload,
)
from cpkit.control.runtime_dir import NameTaken
from cpkit.control.settings import Launch
from cpkit.lab.clock import ClockLab
from cpkit.lab.pool import PoolLab
from cpkit.lab.results import (
    Gathered,
    LabStatus,
    PutReport,
    Timeline,
    explain_table,
    sweep_table,
)
from cpkit.processes import process_id

if TYPE_CHECKING:
    from typing import Self, Unpack

    import pandas as pd

Lengths = int | Sequence[int]
_ATTEMPTS = 3  # somebody else may have begun to start them, and died at it
_log = logging.getLogger("cpkit")


class Options(TypedDict, total=False):
    """Keyword arguments of every workload, with the defaults of `Workload`."""

    strategy: Strategy
    algorithm: AlgorithmName
    symmetric: bool
    heads: int
    head_dim: int
    dtype: str
    tensors: int


def connect(
    name: str = "default",
    *,
    launch: bool = True,
    nproc: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Lab:
    """Attach to the running workers of this name, or start `nproc` of them (default: 4).

    Workers started here end with this process. "default" is the name in CPKIT_NAME where `make lab`
    has set one. Raises NoWorkers when there are none and `launch` is false, OtherWorkers when those
    that run are not as `nproc` or `device` asks, ControlError when they can't be reached or
    started, ValueError for bad arguments.
    """
    if name == "default":
        name = os.environ.get("CPKIT_NAME", name)
    ranks = Launch().nproc if nproc is None else nproc
    settings = Launch(name=name, nproc=ranks, device=device, owner=process_id())
    settings.check()
    for _ in range(_ATTEMPTS if launch else 0):
        client = launcher.attach(name, nproc, device)
        if client is not None:
            return Lab(client)
        _launch(settings)
    return Lab(launcher.require(name, nproc, device))


def _launch(settings: Launch) -> None:
    """Start workers and wait for them, or return when another process is starting them."""
    with contextlib.suppress(NameTaken):
        launcher.wait_until_ready(launcher.start(settings), settings)


class Lab:
    """Requests to one set of workers. Thread-safe; a context manager that closes.

    Workload options of every method: `strategy`, `algorithm`, `symmetric`, `heads`, `head_dim`,
    `dtype`, `tensors`. `lengths` are tokens per sequence; `cp_size` defaults to all ranks. All
    methods raise BadRequest (a ValueError) for bad input, WorkersDied, WorkersBusy, NoAnswer,
    Cancelled, RequestFailed.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._client.on_wait = _say_how_many
        self.pool = PoolLab(client, self.world_size)
        self.clock = ClockLab(client, self.workload)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Lab({self.name!r}, world_size={self.world_size})"

    @property
    def name(self) -> str:
        """The name of the workers."""
        return self._client.connection.name

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._client.connection.world_size

    @property
    def cp_sizes(self) -> tuple[int, ...]:
        """What cp_size may be: the divisors of the world size."""
        world_size = self.world_size
        return tuple(n for n in range(1, world_size + 1) if world_size % n == 0)

    @property
    def owned(self) -> bool:
        """Whether the workers end with this process, because it started them."""
        return self._client.connection.owner == process_id()

    def status(self) -> LabStatus:
        """What the workers are, and how they are; answered at once, also while they are busy."""
        return LabStatus(self._client.call(Status(), StatusResult))

    def gather(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        round: int = 1,
        show: bool = True,
        **options: Unpack[Options],
    ) -> Gathered:
        """One gather, verified bit by bit, with its stages when it is small."""
        body = Gather(self.workload(lengths, cp_size, **options), round, show)
        return Gathered(self._client.call(body, GatherResult))

    def measure(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        samples: int | None = None,
        interval_s: float = 0.1,
        **options: Unpack[Options],
    ) -> Generator[Sample, None, None]:
        """Samples as they come, `samples` of them or without end. Closing the iterator cancels."""
        body = Measure(self.workload(lengths, cp_size, **options), samples, interval_s)
        deadline_s = DEADLINE_S + (interval_s if 0 < interval_s <= 60 else 0)  # else it is refused
        with contextlib.closing(self._client.stream(body, deadline_s)) as replies:
            for reply in replies:
                if isinstance(reply, Sample):
                    yield reply

    def sweep(
        self,
        *,
        sizes_bytes: Sequence[int] | None = None,
        lengths: Sequence[Lengths] | None = None,
        cp_sizes: Sequence[int] | None = None,
        algorithms: Sequence[AlgorithmName] | None = None,
        iterations: int = 20,
        **options: Unpack[Options],
    ) -> pd.DataFrame:
        """A table in nccl-tests' columns, one row for each size, cp_size and algorithm.

        Sizes are `sizes_bytes`, the total gathered bytes of one sequence (rounded up to whole
        tokens, and to the 2·cp of them that zigzag needs), or `lengths`, a list of batches.
        Algorithms of one size are measured interleaved.
        """
        if (sizes_bytes is None) == (lengths is None):
            raise BadRequest("pass either sizes_bytes or lengths, to say which sizes to measure")
        if "algorithm" in options:
            raise BadRequest("sweep measures several algorithms: name them in algorithms=[…]")
        sizes = _whole((self.world_size,) if cp_sizes is None else cp_sizes, "cp_sizes")
        if lengths is not None:
            batches = list(lengths)
        else:
            wanted = _whole(() if sizes_bytes is None else sizes_bytes, "sizes_bytes")
            batches = [_tokens(n, max(sizes), options) for n in wanted]
        workloads = [
            _workload(cp_size, batch, {**options, "algorithm": algorithm})
            for batch, cp_size, algorithm in product(batches, sizes, algorithms or ALGORITHMS)
        ]
        result = self._client.call(Sweep(tuple(workloads), iterations), SweepResult)
        return sweep_table(result.rows)

    def trace(
        self, lengths: Lengths, cp_size: int | None = None, **options: Unpack[Options]
    ) -> Timeline:
        """When each rank was in which stage of one gather."""
        body = Trace(self.workload(lengths, cp_size, **options))
        return Timeline(self._client.call(body, TraceResult))

    def explain(
        self, lengths: Lengths, cp_size: int | None = None, **options: Unpack[Options]
    ) -> pd.DataFrame:
        """Which path the gather takes on each rank, and why: rank, path, reason, send, recv."""
        body = Explain(self.workload(lengths, cp_size, **options))
        return explain_table(self._client.call(body, ExplainResult))

    def put(
        self, cp_size: int | None = None, *, rounds: int = 1000, barrier: bool = True
    ) -> PutReport:
        """Let every rank write into its peers' memory, with or without a barrier before reading."""
        size = self.world_size if cp_size is None else cp_size
        return PutReport(self._client.call(Put(size, rounds, barrier), PutResult))

    def close(self) -> None:
        """Stop talking to the workers; they stay, unless this process started them and ends."""
        self._client.close()

    def stop(self) -> None:
        """End the workers, and return when they are gone."""
        launcher.shut_down(self._client)
        self.close()

    def workload(
        self, lengths: Lengths, cp_size: int | None = None, **options: Unpack[Options]
    ) -> Workload:
        """The workload that the other methods make of their arguments. Raises BadRequest."""
        return _workload(self.world_size if cp_size is None else cp_size, lengths, options)


def _workload(cp_size: int, lengths: Lengths, options: Options) -> Workload:
    fields = {"cp_size": cp_size, **options}
    plain = {name: _plain(value) for name, value in fields.items()}
    try:
        return msgspec.convert({**plain, "lengths": _whole(lengths)}, Workload, strict=True)
    except msgspec.ValidationError as error:
        raise BadRequest(unknown_options(error)) from None


def _tokens(total_bytes: int, cp_size: int, options: Options) -> int:
    """Tokens of one sequence, enough for this many gathered bytes and to be cut for zigzag."""
    if total_bytes < 1:
        raise BadRequest(f"sizes_bytes has {total_bytes}; every size must be 1 byte or more")
    one = _workload(1, 1, options)
    return max(2 * cp_size, -(-total_bytes // one.total_bytes))


def _plain(value: object) -> object:
    """A whole number of another library as an int; anything else as it is."""
    return index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _whole(numbers: Lengths, name: str = "lengths") -> tuple[int, ...]:
    """One whole number or several as plain integers; those of numpy are welcome."""
    try:
        return (index(numbers),)  # type: ignore[arg-type]  # a sequence has no index
    except TypeError:
        pass
    try:
        return tuple(map(index, numbers))  # type: ignore[arg-type]
    except TypeError:
        raise BadRequest(
            f"{name} is {numbers!r}; it must be a whole number, or a list of them: for lengths the "
            f"tokens of each sequence, for example [4097, 812]"
        ) from None


def _say_how_many(ahead: int) -> None:
    _log.warning("the workers are busy: %d request(s) ahead of this one", ahead)
