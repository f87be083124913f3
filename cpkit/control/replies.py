"""What rank 0 answers: interim replies, results, and failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cpkit.control.requests import ClockCall, Message, Workload

if TYPE_CHECKING:
    from typing import Self

    import numpy as np

Path = Literal["symmetric", "staged", "fallback"]
FailureKind = Literal["bad_request", "version", "cancelled", "busy", "internal"]


class Array(Message, frozen=True):
    """A small tensor to look at: dtype name, shape, raw little-endian bytes."""

    dtype: Literal["int64", "int32", "float64", "uint8"]
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """An array as a message."""
        return cls(values.dtype.name, values.shape, values.tobytes())  # type: ignore[arg-type]

    def numpy(self) -> np.ndarray:
        """The array again; read-only."""
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


class Queued(Message, frozen=True, tag="queued", tag_field="is"):
    """Waiting for the workers; `ahead` requests are served first."""

    ahead: int


class Progress(Message, frozen=True, tag="progress", tag_field="is"):
    """Long work goes on."""

    done: int
    total: int
    text: str = ""


class Sample(Message, frozen=True, tag="sample", tag_field="is"):
    """One measurement: medians over `iterations` gathers, per rank, in microseconds."""

    workload: Workload
    sequence: int
    iterations: int
    total_bytes: int
    per_rank_us: tuple[float, ...]
    per_rank_min_us: tuple[float, ...]
    per_rank_p95_us: tuple[float, ...]
    stage_us: dict[str, tuple[float, ...]]
    path: Path
    path_reason: str

    @property
    def time_us(self) -> float:
        """Time of the gather: its slowest rank."""
        return max(self.per_rank_us)

    @property
    def algbw_gbps(self) -> float:
        """Gathered bytes per second, in 1e9 bytes/s (nccl-tests' algbw)."""
        return self.total_bytes / self.time_us / 1e3

    @property
    def busbw_gbps(self) -> float:
        """Bandwidth that each link must carry, in 1e9 bytes/s: algbw·(cp−1)/cp."""
        cp_size = self.workload.cp_size
        return self.algbw_gbps * (cp_size - 1) / cp_size


class WorkerInfo(Message, frozen=True):
    """One rank: where it runs and how it is."""

    rank: int
    pid: int
    host: str
    device: str
    log: str


class StatusResult(Message, frozen=True, tag="status_result", tag_field="is"):
    """The answer to Status."""

    name: str
    version: str
    torch_version: str
    world_size: int
    cp_sizes: tuple[int, ...]
    device: str
    state: Literal["idle", "busy"]
    ahead: int
    uptime_s: float
    endpoint: str
    log_dir: str
    owner_pid: int | None
    symmetric_backend: str
    memory_limit_bytes: int
    workers: tuple[WorkerInfo, ...]


class StageArrays(Message, frozen=True):
    """One stage on one rank: rows of (round, rank, sequence, token), -1 where padded."""

    stage: str
    rank: int
    rows: Array


class GatherResult(Message, frozen=True, tag="gather_result", tag_field="is"):
    """A verified gather."""

    workload: Workload
    round: int
    total_bytes: int
    per_rank_actual_token: tuple[int, ...]
    max_rank_len: int
    checked_rows: int
    path: Path
    path_reason: str
    per_rank_us: tuple[float, ...]
    stages: tuple[StageArrays, ...]


class MeasureResult(Message, frozen=True, tag="measure_result", tag_field="is"):
    """A measurement that ended by itself; its samples were streamed."""

    samples: int


class SweepResult(Message, frozen=True, tag="sweep_result", tag_field="is"):
    """All rows of a sweep, one sample a workload."""

    rows: tuple[Sample, ...]


class ClockResult(Message, frozen=True, tag="clock_result", tag_field="is"):
    """Begin and end of each call, in µs since the first: float64 [calls, iterations, ranks, 2]."""

    workload: Workload
    calls: tuple[ClockCall, ...]
    samples_us: Array


class Span(Message, frozen=True):
    """One stage of one rank, in microseconds since the first rank entered."""

    rank: int
    stage: str
    start_us: float
    stop_us: float


class TraceResult(Message, frozen=True, tag="trace_result", tag_field="is"):
    """A per-rank timeline."""

    workload: Workload
    spans: tuple[Span, ...]


class PoolStats(Message, frozen=True):
    """One rank's pool. Bytes are bytes of this rank's own segments."""

    rank: int
    segments: int
    arena_bytes: int
    spill_bytes: int
    used_bytes: int
    peak_bytes: int
    largest_free_bytes: int
    live_blocks: int
    spills: int
    registrations: int
    registering_ms: float
    spill_ms: float


class PoolMoment(Message, frozen=True):
    """A pool at one moment: what is free but not in `largest_free_bytes` is fragmented."""

    time_s: float
    used_bytes: int
    peak_bytes: int
    free_bytes: int
    largest_free_bytes: int
    spills: int


class PoolResult(Message, frozen=True, tag="pool_result", tag_field="is"):
    """The pool of every rank of the first group after the action, and rank 0's latest moments."""

    cp_size: int
    ranks: tuple[PoolStats, ...]
    note: str = ""
    history: tuple[PoolMoment, ...] = ()


class PathInfo(Message, frozen=True):
    """Which path one rank's collective takes, and why."""

    rank: int
    path: Path
    reason: str
    send: str
    recv: str


class ExplainResult(Message, frozen=True, tag="explain_result", tag_field="is"):
    """One path report a rank."""

    workload: Workload
    ranks: tuple[PathInfo, ...]


class PutResult(Message, frozen=True, tag="put_result", tag_field="is"):
    """What each rank read in its own memory after its peers wrote to it."""

    cp_size: int
    rounds: int
    barrier: bool
    reads: int
    stale: int
    ahead: int
    matrix: Array
    offsets: tuple[int, ...]
    addresses: tuple[int, ...]
    examples: tuple[str, ...]


class Done(Message, frozen=True, tag="done", tag_field="is"):
    """Nothing to bring back, and it worked (Cancel, Shutdown)."""

    text: str = ""


class Failed(Message, frozen=True, tag="failed", tag_field="is"):
    """The request ended without a result. `rank` is the rank that raised, where one did."""

    kind: FailureKind
    message: str
    rank: int | None = None


Result = (
    StatusResult
    | GatherResult
    | MeasureResult
    | SweepResult
    | ClockResult
    | TraceResult
    | PoolResult
    | ExplainResult
    | PutResult
    | Done
)
ReplyBody = Queued | Progress | Sample | Failed | Result


class Reply(Message, frozen=True):
    """What rank 0 sends back."""

    id: str
    body: ReplyBody
