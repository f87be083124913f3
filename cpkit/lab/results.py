"""What a `Lab` brings back: objects that print as tables, with pandas tables and arrays inside."""

from __future__ import annotations

import json
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpkit.control.messages import (
    ExplainResult,
    GatherResult,
    PoolResult,
    PutResult,
    Sample,
    StatusResult,
    TraceResult,
)
from cpkit.lab.chrome_trace import chrome_trace

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from cpkit.layout import ContextParallelMetadata


class _Shown:
    """An object that is shown as a line of text and a table."""

    table: pd.DataFrame

    def summary(self) -> str:
        """One line."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.table.to_string(index=False)}"

    def _repr_html_(self) -> str:
        from html import escape

        table: str = self.table.to_html(index=False, border=0)
        return f"<p>{escape(self.summary())}</p>{table}"


class LabStatus(_Shown):
    """What the workers are, and how they are. Has all fields of `StatusResult`."""

    def __init__(self, result: StatusResult) -> None:
        self.result = result

    def __getattr__(self, name: str) -> Any:
        """Fields of the answer."""
        if name == "result":  # not there yet: an object that is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.result, name)

    @cached_property
    def table(self) -> pd.DataFrame:  # type: ignore[override]
        """One row a rank: rank, pid, host, device, log."""
        return _table(self.result.workers)

    def summary(self) -> str:
        """One line."""
        r = self.result
        owner = f"owned by process {r.owner_pid}" if r.owner_pid else "running until stopped"
        return (
            f"cpkit workers {r.name!r}: {r.world_size} ranks on {r.device} "
            f"({r.symmetric_backend}), {r.state}, up {r.uptime_s:.0f} s, {owner}; "
            f"cpkit {r.version}, torch {r.torch_version}; logs in {r.log_dir}"
        )


class Gathered(_Shown):
    """A gather that was compared bit by bit with what it should be; a mismatch raises."""

    verified = True

    def __init__(self, result: GatherResult) -> None:
        self.result = result
        self.workload = result.workload
        self.cp_size = result.workload.cp_size
        self.lengths = result.workload.lengths
        self.strategy = result.workload.strategy
        self.algorithm = result.workload.algorithm
        self.round = result.round
        self.path = result.path
        self.path_reason = result.path_reason
        self.total_bytes = result.total_bytes
        self.checked_rows = result.checked_rows
        self.per_rank_us = result.per_rank_us
        self.per_rank_actual_token = result.per_rank_actual_token
        self.max_rank_len = result.max_rank_len
        self.stages = tuple(dict.fromkeys(stage.stage for stage in result.stages))

    def stage(self, name: str, rank: int) -> np.ndarray:
        """What a rank held after a stage: int64 `[slots, 4]` of (round, rank, sequence, token).

        Padding is -1. Raises ValueError for a stage or rank that this gather does not have.
        """
        for stage in self.result.stages:
            if stage.stage == name and stage.rank == rank:
                return stage.rows.numpy()
        if not self.stages:
            raise ValueError(
                f"this gather brought no stages: {sum(self.lengths)} tokens are too many to show, "
                f"or show=False was passed"
            )
        raise ValueError(
            f"there is no stage {name!r} of rank {rank}; stages are {', '.join(self.stages)}, "
            f"ranks 0 to {self.cp_size - 1}"
        )

    @cached_property
    def metadata(self) -> ContextParallelMetadata:
        """Who owns which token."""
        from cpkit.layout import prepare_context_parallel_metadata

        return prepare_context_parallel_metadata(self.lengths, self.cp_size, self.strategy)

    @cached_property
    def table(self) -> pd.DataFrame:  # type: ignore[override]
        """One row a rank: rank, actual_token, padded_token, time_us."""
        import pandas as pd

        return pd.DataFrame(
            {
                "rank": range(self.cp_size),
                "actual_token": self.per_rank_actual_token,
                "padded_token": self.max_rank_len,
                "time_us": self.per_rank_us,
            }
        )

    def summary(self) -> str:
        """One line."""
        return (
            f"gathered {self.total_bytes} bytes over cp_size {self.cp_size} by {self.algorithm!r}, "
            f"{self.checked_rows} rows verified bit by bit; path {self.path}: {self.path_reason}"
        )


class Timeline(_Shown):
    """The stages of one gather on every rank, on one clock, in microseconds."""

    def __init__(self, result: TraceResult) -> None:
        self.result = result
        self.workload = result.workload
        self.total_us = max(span.stop_us for span in result.spans)

    @cached_property
    def table(self) -> pd.DataFrame:  # type: ignore[override]
        """One row a stage of a rank: rank, stage, start_us, stop_us, duration_us."""
        table = _table(self.result.spans)
        table["duration_us"] = table["stop_us"] - table["start_us"]
        return table

    def save_chrome_trace(self, path: str | PathLike[str]) -> None:
        """Write the timeline as JSON that https://ui.perfetto.dev and chrome://tracing open."""
        Path(path).write_text(json.dumps(chrome_trace(self.result), indent=1) + "\n")

    def summary(self) -> str:
        """One line."""
        w = self.workload
        return (
            f"{w.algorithm!r} over cp_size {w.cp_size}: {self.total_us:.0f} µs from first to last"
        )


class PutReport(_Shown):
    """What each rank read in its own memory after its peers wrote to it."""

    def __init__(self, result: PutResult) -> None:
        self.result = result
        self.cp_size = result.cp_size
        self.rounds = result.rounds
        self.barrier = result.barrier
        self.reads = result.reads
        self.stale = result.stale
        self.ahead = result.ahead
        self.offsets = result.offsets
        self.addresses = result.addresses
        self.examples = result.examples

    @property
    def stamps(self) -> np.ndarray:
        """The last read: int64 `[reader, writer]`, `writer << 32 | round`."""
        return self.result.matrix.numpy()

    @property
    def matrix(self) -> np.ndarray:
        """Which round each rank saw at its last read: int64 `[reader, writer]`."""
        return self.stamps & 0xFFFFFFFF

    @property
    def writers(self) -> np.ndarray:
        """Who had written what each rank saw at its last read: int64 `[reader, writer]`."""
        return self.stamps >> 32

    @cached_property
    def table(self) -> pd.DataFrame:  # type: ignore[override]
        """One row a rank: rank, offset in the segment, address of its memory in its own process."""
        import pandas as pd

        return pd.DataFrame(
            {
                "rank": range(self.cp_size),
                "offset": self.offsets,
                "address": [hex(address) for address in self.addresses],
            }
        )

    def summary(self) -> str:
        """One line."""
        how = "with a barrier" if self.barrier else "without a barrier"
        return (
            f"{self.rounds} rounds over cp_size {self.cp_size} {how}: {self.reads} reads, "
            f"{self.stale} stale, {self.ahead} ahead"
        )


def explain_table(result: ExplainResult) -> pd.DataFrame:
    """One row a rank: rank, path, reason, send, recv."""
    return _table(result.ranks)


def pool_table(result: PoolResult) -> pd.DataFrame:
    """One row a rank, with the fields of `PoolStats`; what happened is in `attrs["note"]`."""
    table = _table(result.ranks)
    table.attrs["note"] = result.note
    return table


def history_table(result: PoolResult) -> pd.DataFrame:
    """Rank 0's pool over time, one row a moment, with the fields of `PoolMoment`."""
    return _table(result.history)


def sweep_table(rows: tuple[Sample, ...]) -> pd.DataFrame:
    """nccl-tests' columns, one row a workload; times are those of the slowest rank."""
    import pandas as pd

    return pd.DataFrame([_sweep_row(sample) for sample in rows])


def _sweep_row(sample: Sample) -> dict[str, object]:
    workload = sample.workload
    elements = sum(workload.lengths) * workload.heads * workload.head_dim * workload.tensors
    return {
        "size_bytes": sample.total_bytes,
        "count": elements,
        "type": workload.dtype,
        "algorithm": workload.algorithm,
        "cp_size": workload.cp_size,
        "strategy": workload.strategy,
        "symmetric": workload.symmetric,
        "lengths": list(workload.lengths),
        "time_us": sample.time_us,
        "min_us": max(sample.per_rank_min_us),
        "p95_us": max(sample.per_rank_p95_us),
        "algbw_gbps": sample.algbw_gbps,
        "busbw_gbps": sample.busbw_gbps,
        "path": sample.path,
        "path_reason": sample.path_reason,
        "iterations": sample.iterations,
    }


def _table(rows: tuple[Any, ...]) -> pd.DataFrame:
    """Structs as rows."""
    import msgspec
    import pandas as pd

    return pd.DataFrame([msgspec.structs.asdict(row) for row in rows])
