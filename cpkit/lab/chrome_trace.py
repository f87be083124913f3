"""A timeline in Chrome's trace format, which ui.perfetto.dev and chrome://tracing open. Pure.

One process, one thread a rank, one complete event ("ph": "X") a stage; times in microseconds.
Source of the format: "Trace Event Format", the Chromium project's public document.
"""

from __future__ import annotations

from typing import Any

from cpkit.control.messages import TraceResult


def chrome_trace(result: TraceResult) -> dict[str, Any]:
    """The trace as one JSON object."""
    workload = result.workload
    title = f"{workload.algorithm}, cp_size {workload.cp_size}, {workload.total_bytes} bytes"
    ranks = sorted({span.rank for span in result.spans})
    stages = [
        {
            "name": span.stage,
            "cat": "gather",
            "ph": "X",
            "ts": span.start_us,
            "dur": span.stop_us - span.start_us,
            "pid": 0,
            "tid": span.rank,
            "args": {"rank": span.rank, "algorithm": workload.algorithm},
        }
        for span in result.spans
    ]
    names = [_name("process_name", title, 0)]
    names += [_name("thread_name", f"rank {rank}", rank) for rank in ranks]
    return {
        "traceEvents": [*names, *stages],
        "displayTimeUnit": "ns",
        "otherData": {
            "lengths": list(workload.lengths),
            "strategy": workload.strategy,
            "dtype": workload.dtype,
            "heads": workload.heads,
            "head_dim": workload.head_dim,
            "tensors": workload.tensors,
        },
    }


def _name(kind: str, name: str, rank: int) -> dict[str, Any]:
    """A metadata event, which gives a track its name."""
    return {"name": kind, "ph": "M", "pid": 0, "tid": rank, "args": {"name": name}}
