"""Descriptions of the structs that msgspec packs, built at import.

msgspec describes a type when the first message of it is decoded. Two threads that are the first at
the same time end the process (SIGSEGV, seen in msgspec 0.22), for example two that call
`cpkit.connect()`. An import runs in one thread.
"""

from __future__ import annotations

from typing import Any

import msgspec


def describe_types(*kinds: Any) -> None:
    """Describe these types and all that they contain. Call it at the end of their module."""
    for kind in kinds:
        msgspec.msgpack.Decoder(kind)
