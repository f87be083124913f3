"""`Lab`: a notebook's interface to a set of workers. Each call is one request over the socket."""

# Annotations are evaluated here, so that `help()` and Shift-Tab show the allowed values.

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Literal

from msgspec import structs

from cpkit.algorithms import ALGORITHMS, AnyAlgorithm
from cpkit.control import launcher
from cpkit.control.client import Client, request_deadline_s
from cpkit.control.errors import BadRequest, checked, name_the_limit
from cpkit.control.messages import (
    Clock,
    ClockCall,
    ClockResult,
    Explain,
    ExplainResult,
    Gather,
    GatherResult,
    Measure,
    Progress,
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
    dtype_name,
)
from cpkit.lab.arguments import Lengths, several, whole
from cpkit.lab.pool import LabPool
from cpkit.lab.start import attach_or_start
from cpkit.processes import process_id

if TYPE_CHECKING:
    from typing import Self

    import pandas as pd
    import torch

    from cpkit import Explorer

_log = logging.getLogger("cpkit")


@name_the_limit()
def connect(
    name: str = "default",
    *,
    launch: bool = True,
    nproc: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> "Lab":
    """Attach to the running workers of this name, or start `nproc` of them (default: 4).

    Workers started here end with this process. "default" means the name in CPKIT_NAME, if it is
    set. If a rank of the running workers hangs, they are ended, and new ones are started. Raises
    NoWorkers if none are running and `launch` is false, OtherWorkers if the running ones differ
    from `nproc` or `device`, ControlError if they cannot be reached or started, and ValueError for
    bad arguments.
    """
    return Lab(attach_or_start(name, nproc, device, launch=launch))


class Lab:
    """Send requests to one set of workers. Thread-safe; leaving its `with` block closes it.

    `lengths` are tokens per sequence; `cp_size` is a divisor of the world size, by default all
    ranks. A row has `heads` × `head_dim` elements of `dtype`: `torch.bfloat16`, `"bfloat16"` and
    `"bf16"` are the same. `symmetric=False` gathers through ordinary memory. Algorithm "plan" is
    `direct`, prepared once; `status().algorithms` has all names. All methods raise BadRequest (a
    ValueError) for bad input, and WorkersDied, WorkersBusy, NoAnswer, Cancelled or RequestFailed.
    """

    def __init__(self, client: Client) -> None:
        self._device: Literal["auto", "cpu", "cuda"] = "auto"
        self._use(client)

    def _use(self, client: Client) -> None:
        self._client = client
        self._client.on_wait = _log_wait
        self.pool = LabPool(client)

    def __enter__(self) -> "Self":
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
        """The allowed values of cp_size: the divisors of the world size."""
        return tuple(n for n in range(1, self.world_size + 1) if self.world_size % n == 0)

    @property
    def owned(self) -> bool:
        """True if the workers end with this process, because it started them."""
        return self._client.connection.owner == process_id()

    def status(self) -> StatusResult:
        """Return the workers' processes, device, state and limits, even while they are busy."""
        status = self._client.call(Status(), StatusResult)
        self._device = "cpu" if status.device.startswith("cpu") else "cuda"
        return status

    def reconnect(self) -> None:
        """Connect to the workers of this name again, or start as many if none are running.

        All that holds this `Lab` then uses the new workers. Raises what `connect` raises.
        """
        algorithms = self._client.connection.algorithms
        fresh = attach_or_start(self.name, self.world_size, self._device, algorithms=algorithms)
        self.close()
        self._use(fresh)

    def gather(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        strategy: Strategy = "zigzag",
        algorithm: AnyAlgorithm = "direct",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        round: int = 1,
        show: bool = True,
    ) -> GatherResult:
        """Run one gather and verify every bit; if it is small, the result contains its stages.

        Rows are stamped with `round`. With `show=False` the result has no stages.
        """
        workload = self.workload(
            lengths, cp_size, strategy, algorithm, symmetric, heads, head_dim, dtype, tensors
        )
        return self._client.call(Gather(workload, round, show), GatherResult)

    def measure(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        strategy: Strategy = "zigzag",
        algorithm: AnyAlgorithm = "direct",
        algorithms: Sequence[AnyAlgorithm] | None = None,
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        captured: bool = False,
        samples: int | None = None,
        interval_s: float = 0.1,
    ) -> Generator[Sample, None, None]:
        """Yield one sample every `interval_s`: `samples` of them, or endlessly if that is None.

        `algorithms` are interleaved in one measurement: each of them gets a sample per interval.
        With `captured`, each gather is captured in a CUDA graph, and its replays are measured.
        Closing the iterator cancels the measurement.
        """
        if algorithms is not None and algorithm != "direct":
            raise BadRequest("pass either algorithm or algorithms, to say what to measure")
        names = several((algorithm,) if algorithms is None else algorithms, "algorithms")
        rows = (heads, head_dim, dtype, tensors, captured)
        workload = self.workload(lengths, cp_size, strategy, "direct", symmetric, *rows)
        variants = [structs.replace(workload, algorithm=name) for name in names]
        return self.measure_workloads(variants, samples=samples, interval_s=interval_s)

    def measure_workloads(
        self,
        workloads: Sequence[Workload],
        *,
        samples: int | None = None,
        interval_s: float = 0.1,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Generator[Sample, None, None]:
        """Measure as `measure` does; the workloads differ only in algorithm, memory and launch.

        Ends soon after `wanted()` is false; it is called every few milliseconds.
        """
        variants = several(workloads, "workloads")
        if not all(isinstance(variant, Workload) for variant in variants):
            raise BadRequest(
                f"workloads is {workloads!r:.100}; it must be a list of what Lab.workload returns"
            )
        return self._samples(checked(Measure(variants, samples, interval_s)), wanted)

    def _samples(
        self, body: Measure, wanted: Callable[[], bool] = lambda: True
    ) -> Generator[Sample, None, None]:
        # The workers refuse longer intervals.
        deadline_s = request_deadline_s() + (body.interval_s if 0 < body.interval_s <= 60 else 0)
        with contextlib.closing(self._client.stream(body, deadline_s, wanted)) as replies:
            for reply in replies:
                if isinstance(reply, Sample):
                    yield reply

    def sweep(
        self,
        *,
        sizes_bytes: Sequence[int] | None = None,
        lengths: Sequence[Lengths] | None = None,
        cp_sizes: Sequence[int] | None = None,
        algorithms: Sequence[AnyAlgorithm] | None = None,
        strategy: Strategy = "zigzag",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        iterations: int = 20,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> "pd.DataFrame":
        """Return a table with nccl-tests' columns: one row per size, cp_size and algorithm.

        Pass either `sizes_bytes`, the gathered bytes of one sequence (rounded up to whole tokens,
        and to the 2·cp tokens that zigzag needs), or `lengths`, a list of batches. The algorithms
        of one size are measured interleaved. While the ranks work,
        `on_progress=print` prints about a line per second; it must not use this `Lab`.
        """
        if (sizes_bytes is None) == (lengths is None):
            raise BadRequest("pass either sizes_bytes or lengths, to say which sizes to measure")

        def workload(cp_size: int, batch: Lengths, algorithm: AnyAlgorithm) -> Workload:
            return self.workload(
                batch, cp_size, strategy, algorithm, symmetric, heads, head_dim, dtype, tensors
            )

        sizes = whole((self.world_size,) if cp_sizes is None else cp_sizes, "cp_sizes")
        batches = list(several(() if lengths is None else lengths, "lengths"))
        for total_bytes in () if sizes_bytes is None else whole(sizes_bytes, "sizes_bytes"):
            if total_bytes < 1:
                raise BadRequest(f"sizes_bytes has {total_bytes}; each size must be 1 or more")
            token_bytes = workload(1, 1, "direct").total_bytes
            batches.append(max(2 * max(sizes), -(-total_bytes // token_bytes)))
        workloads = tuple(
            workload(cp_size, batch, algorithm)
            for batch, cp_size, algorithm in product(
                batches, sizes, several(algorithms or ALGORITHMS, "algorithms")
            )
        )
        return self._client.call(Sweep(workloads, iterations), SweepResult, None, on_progress).table

    def clock(
        self,
        calls: Sequence[ClockCall | str],
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        strategy: Strategy = "zigzag",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        iterations: int = 20,
        warmup: int = 2,
        barrier: bool = True,
        late_us: float = 0.0,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> ClockResult:
        """Time the calls interleaved (A B C, A B C, …), and return every sample of every rank.

        A call is an algorithm or one of: `barrier`, a barrier alone; `copy`, each rank copies the
        gathered bytes once; `copy_fresh`, the same into memory that was never written;
        `collective`, torch.distributed alone; `launch`, started but not waited for. `warmup=0` and
        `barrier=False` show timing mistakes. Rank r starts each call `r · late_us` late.
        While the ranks work,
        `on_progress=print` prints about a line per second; it must not use this `Lab`.
        """
        workload = self.workload(
            lengths, cp_size, strategy, "direct", symmetric, heads, head_dim, dtype, tensors
        )
        body = Clock(workload, several(calls, "calls"), iterations, warmup, barrier, late_us)
        return self._client.call(body, ClockResult, None, on_progress)

    def trace(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        strategy: Strategy = "zigzag",
        algorithm: AnyAlgorithm = "direct",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
    ) -> TraceResult:
        """Run one gather, and return when each rank was in which stage."""
        workload = self.workload(
            lengths, cp_size, strategy, algorithm, symmetric, heads, head_dim, dtype, tensors
        )
        return self._client.call(Trace(workload), TraceResult)

    def explain(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        *,
        strategy: Strategy = "zigzag",
        algorithm: AnyAlgorithm = "direct",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        observe: bool = False,
    ) -> "pd.DataFrame":
        """Return the path of the gather, one row per rank: rank, path, reason, send, recv.

        With `observe`, a column `observed` has what NCCL selected, according to its log: symmetric
        kernel, copy engine or fallback, with the name of the kernel; or why nothing was observed.
        The log is switched on for this gather only. NCCL writes it on rank 0.
        """
        workload = self.workload(
            lengths, cp_size, strategy, algorithm, symmetric, heads, head_dim, dtype, tensors
        )
        return self._client.call(Explain(workload, observe), ExplainResult).table

    def put(
        self, cp_size: int | None = None, *, rounds: int = 1000, barrier: bool = True
    ) -> PutResult:
        """Let each rank write into its peers' memory, then read with or without barriers."""
        size = self.world_size if cp_size is None else cp_size
        return self._client.call(Put(size, rounds, barrier), PutResult)

    def workload(
        self,
        lengths: Lengths,
        cp_size: int | None = None,
        strategy: Strategy = "zigzag",
        algorithm: AnyAlgorithm = "direct",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        captured: bool = False,
    ) -> Workload:
        """Return the workload that the other methods build from these arguments."""
        return checked(
            Workload(
                self.world_size if cp_size is None else cp_size,
                whole(lengths),
                strategy,
                algorithm,
                symmetric,
                heads,
                head_dim,
                dtype_name(dtype),
                tensors,
                captured,
            )
        )

    def explore(
        self,
        lengths: Sequence[int] = (4096,),
        *,
        interval_s: float = 0.12,
        window_s: float = 5.0,
        idle_after_s: float = 120.0,
        cp_size: int | None = None,
        strategy: Strategy = "zigzag",
        algorithms: Sequence[AnyAlgorithm] = ("direct",),
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        captured: bool = False,
    ) -> "Explorer":
        """Start the live panel and return it. Display it as the last line of a cell.

        The parameters from `cp_size` on are the initial values of its controls. Each algorithm
        gets a sample every `interval_s`, or every second if the panel is not touched for
        `idle_after_s`, and is judged by the last `window_s`. Requires `cpkit[notebooks]`.
        """
        from cpkit import Explorer  # its packages are optional

        return Explorer(
            self,
            lengths,
            interval_s=interval_s,
            window_s=window_s,
            idle_after_s=idle_after_s,
            cp_size=cp_size,
            strategy=strategy,
            algorithms=algorithms,
            symmetric=symmetric,
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            tensors=tensors,
            captured=captured,
        ).start()

    def close(self) -> None:
        """Disconnect. The workers keep running; those of this process end with it."""
        self._client.close()

    @name_the_limit()
    def stop(self) -> None:
        """Stop the workers, and return when they have ended."""
        launcher.shut_down(self._client)
        self.close()


def _log_wait(ahead: int) -> None:
    _log.warning("waiting for the workers: %d request(s) are ahead of this one", ahead)
