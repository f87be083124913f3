"""The closed set of messages on the control socket, and how they are packed.

Every message is a msgspec struct in MessagePack: decoding builds these types or fails; it never
runs code. The decoder rejects unknown fields, operations and enum values, and reports the position
of the fault.

    notebook                         rank 0
       │ Request(id, deadline_s, body) ──▶ │
       │ ◀── Reply(id, Queued(ahead=1))    │   another request is being served
       │ ◀── Reply(id, Progress | Sample)  │   each of them renews the deadline
       │ ◀── Reply(id, <a result>)         │   or Failed; either one ends the request
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from cpkit.control.measurements import *  # noqa: F403 - these modules are the closed set
from cpkit.control.measurements import ClockResult, Sample, SweepResult
from cpkit.control.requests import *  # noqa: F403
from cpkit.control.requests import Message, Request
from cpkit.control.results import *  # noqa: F403
from cpkit.control.results import (
    ExplainResult,
    GatherResult,
    PoolResult,
    PutResult,
    StatusResult,
    TraceResult,
)
from cpkit.packing import describe_types

MAX_MESSAGE_BYTES = 16 << 20
MAX_REQUEST_BYTES = 1 << 20  # a sweep of 1024 workloads has about 0.1 MB
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 30_000  # a pause of either side that costs nothing
ENCRYPTION_BYTES = 33  # that CURVE adds to a message
# The range of a row's stamp (cpkit.provenance); beyond it, stamps of different rows are equal.
MAX_SEQUENCES = 1024  # per batch
TOO_MANY_FILES_CODE = 500  # status of a connection that is rejected, as in ZeroMQ's RFC 27
FailureKind = Literal["bad_request", "version", "cancelled", "busy", "hung", "internal"]
T = TypeVar("T")


class Queued(Message, frozen=True, tag="queued", tag_field="is"):
    """The request waits until `ahead` other requests have been served."""

    ahead: int


class Progress(Message, frozen=True, tag="progress", tag_field="is"):
    """`done` of `total` units of work are complete; `text` begins with the name of the unit.

    A `total` of 0 is a keep-alive: the ranks still work.
    """

    done: int
    total: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.done} of {self.total} {self.text}".rstrip()


class Done(Message, frozen=True, tag="done", tag_field="is"):
    """The request succeeded and has no result (Measure, Cancel, Shutdown)."""

    text: str = ""


class Failed(Message, frozen=True, tag="failed", tag_field="is"):
    """The request ended without a result. `rank` is the rank that raised, if one did."""

    kind: FailureKind
    message: str
    rank: int | None = None


Result = (
    StatusResult
    | GatherResult
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
    """A message from rank 0 to a client."""

    id: str
    body: ReplyBody


class Envelope(msgspec.Struct):
    """The fields that a request has in every protocol version, to reject another version."""

    id: str
    version: int


_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Pack a message. Raises ValueError if it is too large for its type."""
    data, name = _encoder.encode(message), type(message).__name__
    most, advice = MAX_MESSAGE_BYTES, "request fewer or smaller arrays"
    if isinstance(message, Request):
        most, advice = MAX_REQUEST_BYTES, "pass fewer workloads or sequences"
    if len(data) > most:
        raise ValueError(f"{name} packs to {len(data)} bytes; at most {most} fit: {advice}")
    return data


def decode(data: bytes, kind: type[T]) -> T:
    """Unpack one message of this type. Raises msgspec.DecodeError or ValidationError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise msgspec.DecodeError(
            f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed"
        )
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # also raised for invalid data
        raise msgspec.DecodeError(str(error)) from error


describe_types(Reply, Envelope)
