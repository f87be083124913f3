"""The closed set of requests that a client can send to the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cpkit.algorithms import AlgorithmChoice
from cpkit.packing import describe_types

if TYPE_CHECKING:
    from cpkit.batch import Batch
    from cpkit.layout import ContextParallelMetadata

PROTOCOL_VERSION = 5

Strategy = Literal["zigzag", "interleave", "contiguous"]
OtherCall = Literal["barrier", "copy", "copy_fresh", "collective", "launch"]
ClockCall = Literal[AlgorithmChoice, OtherCall]
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
_DTYPE_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(dtype: object) -> str:
    """Return torch's name of a dtype; accepts `torch.bfloat16`, `"bfloat16"` and `"bf16"`."""
    name = str(dtype).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages: immutable, and strict about field names."""


class Workload(Message, frozen=True):
    """One gather: which rank owns which token, the shape of a row, and the algorithm."""

    cp_size: int
    lengths: tuple[int, ...]
    strategy: Strategy = "zigzag"
    algorithm: str = "direct"
    symmetric: bool = True
    heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    tensors: int = 2
    captured: bool = False  # measure replays of a CUDA graph of the gather

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one tensor. Raises ValueError for an unknown dtype."""
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"dtype is {self.dtype!r:.80}; it must be one of {', '.join(DTYPE_BYTES)}"
            )
        return self.heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole gathered result: all tensors, without padding."""
        return sum(self.lengths) * self.row_bytes * self.tensors

    def without_variant(self) -> Workload:
        """Return the workload with default algorithm, memory and launch, to compare all else."""
        return msgspec.structs.replace(self, algorithm="direct", symmetric=True, captured=False)

    def arguments(self) -> dict[str, Any]:
        """Return the fields as arguments of `Lab.gather`, `sweep`, and the other methods."""
        fields = msgspec.structs.asdict(self)
        del fields["captured"]
        return fields

    def batch(self) -> Batch:
        """Return how many rows each rank holds. Raises ValueError for lengths that do not fit."""
        from cpkit.batch import Batch, checked_batch

        return Batch(*checked_batch(self.lengths, self.cp_size, self.strategy))

    def layout(self) -> ContextParallelMetadata:
        """Return which rank owns which token. Raises ValueError for lengths that do not fit."""
        from cpkit.layout import prepare_context_parallel_metadata

        return prepare_context_parallel_metadata(self.lengths, self.cp_size, self.strategy)


class Status(Message, frozen=True, tag="status", tag_field="op"):
    """Describe the workers. Answered immediately, even while they are busy."""


class Gather(Message, frozen=True, tag="gather", tag_field="op"):
    """Run one gather, verify every bit, and return the stages of a small one."""

    workload: Workload
    round: int = 1
    show: bool = True


class Measure(Message, frozen=True, tag="measure", tag_field="op"):
    """Time workloads until `samples` of each are sent or the request is cancelled.

    They differ only in algorithm, memory and launch, and their gathers are interleaved.
    """

    workloads: tuple[Workload, ...]
    samples: int | None = None
    interval_s: float = 0.1


class Sweep(Message, frozen=True, tag="sweep", tag_field="op"):
    """Time workloads. Consecutive ones that differ only in algorithm or memory are interleaved."""

    workloads: tuple[Workload, ...]
    iterations: int = 20


class Trace(Message, frozen=True, tag="trace", tag_field="op"):
    """Record one gather as a timeline: every stage of every rank on one clock."""

    workload: Workload


class Pool(Message, frozen=True, tag="pool", tag_field="op"):
    """Show, resize, warm up or fill the symmetric pool of a cp_size.

    `leave` releases the client's blocks, and returns what then is unused to the system.
    """

    cp_size: int
    action: Literal["stats", "configure", "warm_up", "allocate", "release", "leave"] = "stats"
    prealloc_bytes: int | None = None
    max_tokens: int | None = None
    heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    tensors: int = 2
    nbytes: int | None = None


class Explain(Message, frozen=True, tag="explain", tag_field="op"):
    """Run one gather, and return the path that each rank took, with the reason.

    With `observe`, run it once more, and return which kernels NCCL selected, according to its log.
    """

    workload: Workload
    observe: bool = False


class Put(Message, frozen=True, tag="put", tag_field="op"):
    """Write stamps into every peer's memory, with or without a barrier before reading."""

    cp_size: int
    rounds: int = 1000
    barrier: bool = True


class Clock(Message, frozen=True, tag="clock", tag_field="op"):
    """Time calls of one workload, interleaved, and return every sample of every rank.

    A call is an algorithm, or one of: `barrier`; `copy`, each rank copies the gathered bytes once;
    `copy_fresh`, the same into memory that was never written; `collective`, torch.distributed
    alone; `launch`, which starts a gather and does not wait for it. With `warmup=0` the first
    sample is the first call. Rank r starts each call `r · late_us` late; with `barrier` a second
    barrier follows the delay.
    """

    workload: Workload
    calls: tuple[str, ...]
    iterations: int = 20
    warmup: int = 2
    barrier: bool = True
    late_us: float = 0.0


class Cancel(Message, frozen=True, tag="cancel", tag_field="op"):
    """Cancel the request with this id, queued or running. The workers keep running."""

    target: str


class Shutdown(Message, frozen=True, tag="shutdown", tag_field="op"):
    """End all workers."""


Body = Status | Gather | Measure | Sweep | Clock | Trace | Pool | Explain | Put | Cancel | Shutdown


class Request(Message, frozen=True):
    """A message from a client to rank 0."""

    id: str
    deadline_s: float
    body: Body
    version: int = PROTOCOL_VERSION


describe_types(Request)
