"""What ranks say to each other when they meet before a collective, and what follows from it.

A note is two texts: this rank's complaint about its arguments (usually empty) and a description of
the call, which must be equal on all ranks. Bad arguments are words until everybody has read them:
a rank that raised alone would leave its peers waiting.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import msgspec

from cpkit.sync.barrier import NOTE_BYTES

_TEXT_BYTES = NOTE_BYTES // 2 - 256


def explain_disagreement(notes: list[bytes]) -> str:
    """What the ranks' notes say, in one sentence: the problems, or else the calls that differ."""
    said: list[tuple[str, str]] = [msgspec.msgpack.decode(n, type=tuple[str, str]) for n in notes]
    problems = _by_rank([problem for problem, _ in said])
    if problems:
        return problems
    return (
        f"the ranks call different collectives. {_by_rank([call for _, call in said])}. "
        f"All ranks must pass the same."
    )


def _by_rank(texts: list[str]) -> str:
    """Say each text once, with the ranks that said it; empty ones are left out."""
    ranks_of: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks_of.setdefault(text, []).append(str(rank))
    if len(ranks_of) == 1 and len(*ranks_of.values()) == len(texts):
        return next(iter(ranks_of))
    return "; ".join(f"rank(s) {', '.join(who)}: {text}" for text, who in ranks_of.items())


@lru_cache(maxsize=256)
def pack_note(problem: str, call: str) -> bytes:
    """What a rank says to the others: bytes that are equal exactly when the texts are."""
    return msgspec.msgpack.encode((_cut(problem), _cut(call)))


def _cut(text: str) -> str:
    """Two texts of this size, the pool's books and a place fit on the board together.

    What is cut off still counts: two texts that differ only there end in different digests.
    """
    data = text.encode()
    if len(data) <= _TEXT_BYTES:
        return text
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return f"{data[: _TEXT_BYTES - 48].decode(errors='ignore')} … ({digest})"
