"""What a client may ask of the workers: the closed set of requests."""

from __future__ import annotations

from typing import Literal

import msgspec

from cpkit.algorithms import AlgorithmName

PROTOCOL_VERSION = 1

Strategy = Literal["zigzag", "interleave", "contiguous"]
ClockCall = Literal[
    "padded",
    "padded_symm_recv",
    "padded_symm",
    "direct",
    "barrier",
    "copy",
    "copy_fresh",
    "collective",
    "launch",
]
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages: immutable, and strict about field names."""


class Workload(Message, frozen=True):
    """One gather to run: who owns what, of which shape, moved by which algorithm."""

    cp_size: int
    lengths: tuple[int, ...]
    strategy: Strategy = "zigzag"
    algorithm: AlgorithmName = "direct"
    symmetric: bool = True
    heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    tensors: int = 2

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one tensor. Raises ValueError for a dtype that nobody gathers."""
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}")
        return self.heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole gathered result: all tensors, without padding."""
        return sum(self.lengths) * self.row_bytes * self.tensors


class Status(Message, frozen=True, tag="status", tag_field="op"):
    """What the workers are, and how they are."""


class Gather(Message, frozen=True, tag="gather", tag_field="op"):
    """Run one gather, verify it by provenance, and bring back its stages when it is small."""

    workload: Workload
    round: int = 1
    show: bool = True


class Measure(Message, frozen=True, tag="measure", tag_field="op"):
    """Time a workload until `samples` are sent or the request is cancelled."""

    workload: Workload
    samples: int | None = None
    interval_s: float = 0.1


class Sweep(Message, frozen=True, tag="sweep", tag_field="op"):
    """Time several workloads, one row each; rows of one size are measured interleaved."""

    workloads: tuple[Workload, ...]
    iterations: int = 20


class Trace(Message, frozen=True, tag="trace", tag_field="op"):
    """One gather as a timeline: every stage of every rank on one clock."""

    workload: Workload


class Pool(Message, frozen=True, tag="pool", tag_field="op"):
    """Look at, size, warm up or deliberately fill the symmetric pool of a cp_size."""

    cp_size: int
    action: Literal["stats", "configure", "warm_up", "allocate", "release"] = "stats"
    prealloc_bytes: int | None = None
    max_tokens: int | None = None
    heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    tensors: int = 2
    nbytes: int | None = None


class Explain(Message, frozen=True, tag="explain", tag_field="op"):
    """Which path each rank's gather takes, and why."""

    workload: Workload


class Put(Message, frozen=True, tag="put", tag_field="op"):
    """Every rank writes its stamp into every peer's memory; a barrier before reading, or none."""

    cp_size: int
    rounds: int = 1000
    barrier: bool = True


class Clock(Message, frozen=True, tag="clock", tag_field="op"):
    """Time calls of one workload in turn, and bring back every sample of every rank.

    Beside the algorithms: `barrier`, nothing else; `copy`, every rank copies the gathered bytes
    once; `copy_fresh`, the same into memory that nobody has touched; `collective`, that of
    torch.distributed alone; `launch`, started and not waited for. Without `warmup` the first
    sample is the first call; without `barrier` a rank's clock starts when that rank comes, which
    is `late_us` later for each rank than for the one before it.
    """

    workload: Workload
    calls: tuple[ClockCall, ...]
    iterations: int = 20
    warmup: int = 2
    barrier: bool = True
    late_us: float = 0.0


class Cancel(Message, frozen=True, tag="cancel", tag_field="op"):
    """Give up the request with this id, queued or running; the workers stay."""

    target: str


class Shutdown(Message, frozen=True, tag="shutdown", tag_field="op"):
    """End all workers."""


Body = Status | Gather | Measure | Sweep | Clock | Trace | Pool | Explain | Put | Cancel | Shutdown


class Request(Message, frozen=True):
    """What a client sends."""

    id: str
    deadline_s: float
    body: Body
    version: int = PROTOCOL_VERSION
