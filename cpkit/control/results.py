"""The results of the workers, one struct each; timings are in `measurements`.

Each rank reports its part of a result, `of_all_ranks` joins the parts on rank 0, the socket carries
the joined result, and a notebook shows it as a line and a table.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control.requests import Message, Workload
from cpkit.memory.nccl_log import Selections
from cpkit.memory.path import PathName, PathReport
from cpkit.memory.statistics import PoolSample, PoolStatistics
from cpkit.timing import ClockName, Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from typing import Self

    import numpy as np
    import pandas as pd

    from cpkit.layout import ContextParallelMetadata


class Array(Message, frozen=True):
    """A small tensor: dtype name, shape, raw little-endian bytes."""

    dtype: Literal["int64", "int32", "float64", "uint8"]
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Pack an array."""
        return cls(values.dtype.name, values.shape, values.tobytes())  # type: ignore[arg-type]

    def numpy(self) -> np.ndarray:
        """Return a read-only array."""
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


class ShownResult(Message, frozen=True):
    """A result that is joined from one part per rank, and shown as a line of text and a table."""

    joined: ClassVar[tuple[str, ...]] = ()  # tuples with one part per rank
    added: ClassVar[tuple[str, ...]] = ()  # counts, which are summed

    @classmethod
    def of_all_ranks(cls, parts: Sequence[Self]) -> Self:
        """Join the parts, one per rank in rank order. Other fields are those of rank 0."""
        fields = {name: [getattr(part, name) for part in parts] for name in cls.joined + cls.added}
        tuples = {name: tuple(chain.from_iterable(fields[name])) for name in cls.joined}
        return msgspec.structs.replace(
            parts[0], **tuples, **{name: sum(fields[name]) for name in cls.added}
        )

    @property
    def table(self) -> pd.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return the result in one line."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.table.to_string(index=False)}"

    def _repr_html_(self) -> str:
        from html import escape

        table: str = self.table.to_html(index=False, border=0)
        return f"<p>{escape(self.summary())}</p>{table}"


class WorkloadResult(ShownResult, frozen=True):
    """A result of one workload, with the workload's fields."""

    workload: Workload

    @property
    def cp_size(self) -> int:
        """Number of ranks of the gather."""
        return self.workload.cp_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence."""
        return self.workload.lengths

    @property
    def strategy(self) -> str:
        """Which rank owns which token."""
        return self.workload.strategy

    @property
    def algorithm(self) -> str:
        """The algorithm of the gather."""
        return self.workload.algorithm

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole gathered result, without padding."""
        return self.workload.total_bytes


class WorkerInfo(Message, frozen=True):
    """One rank: its process, device and log file."""

    rank: int
    pid: int
    host: str
    device: str
    log: str


class StatusResult(ShownResult, frozen=True, tag="status_result", tag_field="is"):
    """The workers: processes, devices, state, and limits."""

    name: str
    version: str
    torch_version: str
    world_size: int
    cp_sizes: tuple[int, ...]
    device: str
    state: Literal["idle", "busy", "hung"]
    ahead: int
    uptime_s: float
    endpoint: str
    log_dir: str
    owner_pid: int | None
    symmetric_backend: str
    memory_limit_bytes: int
    workers: tuple[WorkerInfo, ...]
    cores: int = 0  # that rank 0 may use
    gpus: int = 0  # that the ranks use
    load: float = 0.0  # of rank 0's machine, on average over one minute
    algorithms: tuple[str, ...] = ALGORITHM_CHOICES  # and the user's own, which follow

    @property
    def table(self) -> pd.DataFrame:
        """One row per rank: rank, pid, host, device, log."""
        return _table_of(self.workers)

    def summary(self) -> str:
        """Return name, size, device, state, versions and logs in one line."""
        owner = f"owned by process {self.owner_pid}" if self.owner_pid else "running until stopped"
        own = ", ".join(self.algorithms[len(ALGORITHM_CHOICES) :])
        return (
            f"cpkit workers {self.name!r}: {self.world_size} ranks on {self.device} "
            f"({self.symmetric_backend}), {self.state}, up {self.uptime_s:.0f} s, {owner}; "
            f"{f'algorithms of your own: {own}; ' if own else ''}"
            f"cpkit {self.version}, torch {self.torch_version}; logs in {self.log_dir}"
        )


class StageArray(Message, frozen=True):
    """The rows of one stage on one rank: (round, rank, sequence, token), or -1 for padding."""

    stage: str
    rank: int
    rows: Array


class GatherResult(WorkloadResult, frozen=True, tag="gather_result", tag_field="is"):
    """A gather, every bit of which was compared with the expected rows; a mismatch raises."""

    round: int
    per_rank_actual_token: tuple[int, ...]
    max_rank_len: int
    checked_rows: int
    path: PathName
    path_reason: str
    clock: ClockName
    per_rank_us: tuple[float, ...]
    arrays: tuple[StageArray, ...]

    joined = ("per_rank_us", "arrays")
    added = ("checked_rows",)
    verified = True

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the recorded stages; empty for a large gather."""
        return tuple(dict.fromkeys(array.stage for array in self.arrays))

    def stage(self, name: str, rank: int) -> np.ndarray:
        """Return what a rank held after a stage: int64 `[slots, 4]`, one row per slot.

        A row is (round, rank, sequence, token), or -1 for padding. Raises ValueError for a stage or
        rank that this gather does not have.
        """
        for array in self.arrays:
            if array.stage == name and array.rank == rank:
                return array.rows.numpy()
        if not self.arrays:
            raise ValueError(
                f"this gather has no stages: {sum(self.lengths)} tokens are too many to show, or "
                f"show=False was passed. Use fewer tokens and show=True."
            )
        raise ValueError(
            f"there is no stage {name!r} of rank {rank}; stages are {', '.join(self.stages)}, "
            f"ranks are 0 to {self.cp_size - 1}"
        )

    @property
    def metadata(self) -> ContextParallelMetadata:
        """Which rank owns which token."""
        return self.workload.layout()

    @property
    def table(self) -> pd.DataFrame:
        """One row per rank: rank, actual_token, padded_token, time_us (by `clock`)."""
        return rank_table(
            self.cp_size,
            actual_token=self.per_rank_actual_token,
            padded_token=self.max_rank_len,
            time_us=self.per_rank_us,
        )

    def summary(self) -> str:
        """Return what was gathered and how in one line."""
        return (
            f"gathered {self.total_bytes} bytes over cp_size {self.cp_size} by {self.algorithm!r}, "
            f"{self.checked_rows} rows verified bit by bit; path {self.path}: {self.path_reason}"
        )


class TraceResult(WorkloadResult, frozen=True, tag="trace_result", tag_field="is"):
    """The stages of one gather on every rank, in nanoseconds since the first start.

    If `spans_hosts`, the clocks of the hosts differ, so each rank starts at 0.
    """

    spans: tuple[tuple[Span, ...], ...]  # by rank
    spans_hosts: bool = False

    @classmethod
    def of_all_ranks(cls, parts: Sequence[Self]) -> Self:
        """Join the spans, and subtract the first start."""
        starts_ns = [part.spans[0][0].start_ns for part in parts]
        zeros_ns = starts_ns if parts[0].spans_hosts else [min(starts_ns)] * len(parts)
        spans = tuple(
            tuple(Span(s.stage, s.start_ns - zero, s.stop_ns - zero) for s in part.spans[0])
            for part, zero in zip(parts, zeros_ns, strict=True)
        )
        return msgspec.structs.replace(parts[0], spans=spans)

    @property
    def total_us(self) -> float:
        """Time from the first start to the last end of a stage."""
        return max(span.stop_ns for spans in self.spans for span in spans) / 1e3

    @property
    def table(self) -> pd.DataFrame:
        """One row per stage and rank: rank, stage, start_us, stop_us, duration_us."""
        import pandas as pd

        rows = [
            (rank, span.stage, *(n / 1e3 for n in (span.start_ns, span.stop_ns, span.took_ns)))
            for rank, spans in enumerate(self.spans)
            for span in spans
        ]
        return pd.DataFrame(rows, columns=["rank", "stage", "start_us", "stop_us", "duration_us"])

    def summary(self) -> str:
        """Return the algorithm and the total time in one line."""
        return (
            f"{self.algorithm!r} over cp_size {self.cp_size}: {self.total_us:.0f} µs from the "
            f"first start to the last end"
        )

    def chrome_trace(self) -> dict[str, Any]:
        """Return the timeline in Chrome's trace format: one thread per rank, times in µs.

        The format is specified in the Chromium project's document "Trace Event Format".
        """
        work = self.workload
        title = f"{work.algorithm}, cp_size {work.cp_size}, {work.total_bytes} bytes"
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": title}}
        ]
        for rank, spans in enumerate(self.spans):
            track = {"pid": 0, "tid": rank}
            name = {"name": f"rank {rank}"}
            events.append({"name": "thread_name", "ph": "M", **track, "args": name})
            events += [
                {
                    "name": span.stage,
                    "cat": "gather",
                    "ph": "X",  # a complete event: start and duration
                    "ts": span.start_ns / 1e3,
                    "dur": span.took_ns / 1e3,
                    **track,
                    "args": {"rank": rank, "algorithm": work.algorithm},
                }
                for span in spans
            ]
        return {
            "traceEvents": events,
            "displayTimeUnit": "ns",
            "otherData": msgspec.to_builtins(work),
        }

    def save_chrome_trace(self, path: str | PathLike[str]) -> None:
        """Write the timeline as JSON that https://ui.perfetto.dev and chrome://tracing open."""
        Path(path).write_text(json.dumps(self.chrome_trace(), indent=1) + "\n")


class PoolResult(ShownResult, frozen=True, tag="pool_result", tag_field="is"):
    """The pool of every rank of the first group after the action, and rank 0's latest samples."""

    cp_size: int
    ranks: tuple[PoolStatistics, ...]
    note: str = ""
    history: tuple[PoolSample, ...] = ()

    joined = ("ranks",)

    @property
    def table(self) -> pd.DataFrame:
        """One row per rank: rank and the fields of `PoolStatistics`; the note is in `attrs`."""
        table = _table_of(self.ranks, with_rank=True)
        table.attrs["note"] = self.note
        return table

    @property
    def history_table(self) -> pd.DataFrame:
        """Rank 0's pool over time: one row per sample, with the fields of `PoolSample`."""
        return _table_of(self.history)


class ExplainResult(WorkloadResult, frozen=True, tag="explain_result", tag_field="is"):
    """The path of the gather on each rank, and if requested what NCCL selected there."""

    ranks: tuple[PathReport, ...]
    observed: tuple[Selections, ...] = ()

    joined = ("ranks", "observed")

    @property
    def table(self) -> pd.DataFrame:
        """One row per rank: rank, path, reason, send, recv, and `observed` if requested."""
        table = _table_of(self.ranks, with_rank=True)
        if self.observed:
            table["observed"] = [str(each) for each in self.observed]
        return table


class PutResult(ShownResult, frozen=True, tag="put_result", tag_field="is"):
    """What each rank read from its own memory while its peers wrote to it."""

    cp_size: int
    rounds: int
    barrier: bool
    reads: int
    stale: int
    ahead: int
    last_read: Array  # int64 [reader, writer]: writer << 32 | round
    offsets: tuple[int, ...]
    addresses: tuple[int, ...]
    examples: tuple[str, ...]

    joined = ("offsets", "addresses", "examples")
    added = ("reads", "stale", "ahead")

    @classmethod
    def of_all_ranks(cls, parts: Sequence[Self]) -> Self:
        """Join the parts, and the last reads as one matrix."""
        import numpy as np

        last_read = Array.of(np.concatenate([part.stamps for part in parts]))
        return msgspec.structs.replace(super().of_all_ranks(parts), last_read=last_read)

    @property
    def stamps(self) -> np.ndarray:
        """The last read: int64 `[reader, writer]`, `writer << 32 | round`."""
        return self.last_read.numpy()

    @property
    def matrix(self) -> np.ndarray:
        """The round in each stamp of the last read: int64 `[reader, writer]`."""
        return self.stamps & 0xFFFFFFFF

    @property
    def writers(self) -> np.ndarray:
        """The writer in each stamp of the last read: int64 `[reader, writer]`."""
        return self.stamps >> 32

    @property
    def table(self) -> pd.DataFrame:
        """One row per rank: rank, offset in the segment, address in that rank's process."""
        addresses = [hex(address) for address in self.addresses]
        return rank_table(self.cp_size, offset=self.offsets, address=addresses)

    def summary(self) -> str:
        """Return rounds, reads, stale and ahead in one line."""
        how = "with a barrier" if self.barrier else "without a barrier"
        return (
            f"{self.rounds} rounds over cp_size {self.cp_size} {how}: {self.reads} reads, "
            f"{self.stale} stale, {self.ahead} ahead"
        )


def rank_table(cp_size: int, **columns: object) -> pd.DataFrame:
    """Return a table with one row per rank."""
    import pandas as pd

    return pd.DataFrame({"rank": range(cp_size), **columns})


def _table_of(rows: Sequence[msgspec.Struct], with_rank: bool = False) -> pd.DataFrame:
    """Return structs as rows. `with_rank` adds their index as the first column."""
    import pandas as pd

    table = pd.DataFrame([msgspec.structs.asdict(row) for row in rows])
    if with_rank:
        table.insert(0, "rank", range(len(rows)))
    return table
