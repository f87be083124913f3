"""How large the arena is that a symmetric pool makes up front."""

from __future__ import annotations

import os

import msgspec

from cpkit.arena import rounded
from cpkit.rendezvous import Rendezvous
from cpkit.shm import free_bytes

_MAX_DEFAULT_BYTES = 64 << 20


def agree_on_prealloc(rendezvous: Rendezvous, prealloc: int | None) -> int:
    """One arena size in bytes for all ranks; collective.

    None asks for the default: `CPKIT_SYMM_PREALLOC_GB`, else an eighth of the free shared memory
    shared out among the ranks, at most 64 MiB. Ranks read that at different moments, so the least
    of their figures counts. Raises ValueError on every rank for a size below 1.
    """
    problem, offer = "", 0
    if prealloc is None:
        offer = _default(rendezvous.size)
    elif isinstance(prealloc, int) and prealloc > 0:
        offer = rounded(prealloc)
    else:
        problem = f"prealloc is {prealloc!r} bytes; it must be 1 or more, or None for the default"
    note = msgspec.msgpack.encode((problem, offer))
    answers = rendezvous.exchange(note, "agree on the pool's size")
    said = [msgspec.msgpack.decode(answer, type=tuple[str, int]) for answer in answers]
    problems = [text for text, _ in said if text]
    if problems:
        raise ValueError(problems[0])
    return min(size for _, size in said) if prealloc is None else offer


def _default(ranks: int) -> int:
    chosen_gb = os.environ.get("CPKIT_SYMM_PREALLOC_GB")
    if chosen_gb:
        return rounded(int(float(chosen_gb) * (1 << 30)))
    return rounded(min(free_bytes() // (8 * ranks), _MAX_DEFAULT_BYTES))
