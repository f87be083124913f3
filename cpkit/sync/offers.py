"""Making something together: each rank says what it brings, or why not; then all go on, or none.

rank 0   allocated 64 MiB ──┐                ┌─▶ all the same: go on
rank 1   allocated 64 MiB ──┼── exchanged ───┤
rank 2   "out of memory"  ──┘                └─▶ a problem, or other sizes: raise on every rank
"""

from __future__ import annotations

import msgspec

from cpkit.sync.exchange import StoreExchange


class SymmetricMemoryError(RuntimeError):
    """Symmetric memory could not be made, or ranks disagree about it. Raised on every rank."""


class Offer(msgspec.Struct):
    """What a rank brings: its memory's name and size, or why it has none."""

    name: str
    nbytes: int
    problem: str = ""


def agree(rendezvous: StoreExchange, offer: Offer, purpose: str) -> list[Offer]:
    """Everybody's offer, by rank. Collective, with the rendezvous' deadline.

    Raises SymmetricMemoryError on every rank when one has a problem or the sizes differ.
    """
    answers = rendezvous.exchange(msgspec.msgpack.encode(offer), purpose)
    offers = [msgspec.msgpack.decode(answer, type=Offer) for answer in answers]
    problems = [f"rank {rank}: {each.problem}" for rank, each in enumerate(offers) if each.problem]
    if problems:
        raise SymmetricMemoryError(f"cannot {purpose}. " + "; ".join(problems))
    if len({each.nbytes for each in offers}) > 1:
        sizes = ", ".join(f"rank {rank}: {each.nbytes}" for rank, each in enumerate(offers))
        raise SymmetricMemoryError(
            f"cannot {purpose}: ranks ask for different sizes ({sizes} bytes). Sizes in symmetric "
            f"memory must come from numbers that are equal on all ranks, such as max_rank_len."
        )
    return offers
