"""The closed set of messages that travel over the control socket, and how they are packed.

Every message is a msgspec struct in MessagePack: decoding builds these types or fails, it never
runs code. Unknown fields, operations and enum values are refused by the decoder, with the place of
the fault in its message.

    notebook                         rank 0
       │ Request(id, deadline_s, body) ──▶ │
       │ ◀── Reply(id, Queued(ahead=1))    │   somebody else is being served
       │ ◀── Reply(id, Progress | Sample)  │   each of them renews the deadline
       │ ◀── Reply(id, <a result>)         │   or Failed; exactly one of the two ends the request
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from cpkit.control.replies import *  # noqa: F403 - the closed set is both modules and no more
from cpkit.control.requests import *  # noqa: F403

MAX_MESSAGE_BYTES = 16 << 20
T = TypeVar("T")


class Envelope(msgspec.Struct):
    """The part of a request that every protocol version has: enough to answer "wrong version"."""

    id: str
    version: int


_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Pack a message. Raises ValueError when it would be larger than MAX_MESSAGE_BYTES."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"{type(message).__name__} packs to {len(data)} bytes; a message may have at most "
            f"{MAX_MESSAGE_BYTES}. Ask for fewer or smaller arrays."
        )
    return data


def decode(data: bytes, kind: type[T]) -> T:
    """Unpack one message of the given kind. Raises msgspec.DecodeError or ValidationError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise msgspec.DecodeError(
            f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed"
        )
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:  # no DecodeErrors, but garbage as well
        raise msgspec.DecodeError(str(error)) from error
