"""The words of the three notebooks, each explained once.

A line `{glossary: token, row; rank order}` in a notebook's source becomes a table of these words.
"""

from __future__ import annotations

import re

WORDS: dict[str, str] = {
    "token, row": "one position of the KV cache; a row is its `[heads, head_dim]` slice",
    "cp_size, cp_rank": "how many ranks share the batch; which of them I am",
    "strategy": "who owns which token: `zigzag`, `interleave` or `contiguous`",
    "block": "zigzag cuts each sequence into 2·cp of them; rank r owns blocks r and 2·cp−1−r",
    "per_rank_actual_token": "rows that each rank really holds",
    "max_rank_len": "rows of each rank after padding: the maximum over ranks",
    "rank order": "rank 0's rows, then rank 1's, …: what is left when the padding is stripped",
    "token order": "token 0, 1, 2, …, sequence by sequence: what attention reads",
    "reorganize, rerange": "upstream's words: strip → rank order; reorder → token order",
    "provenance": "what a row says of itself: round, rank, sequence, token",
    "poison": "bytes put into a buffer before it is used, so that what nobody wrote is seen",
    "mutant": "a solution made wrong on purpose; a good check refuses every one of them",
    "pass": "reading and writing all gathered data once",
    "symmetric memory": "a buffer that all ranks allocated alike and all peers can address",
    "segment": "one registered allocation: every rank made it, every rank mapped it",
    "arena, pool": "the big segment made up front; the allocator over it",
    "spill": "an allocation that did not fit the arena and made a new segment at run time",
    "put, get": "write into, read from a peer's memory",
    "barrier": "nobody goes on before all have come",
    "signal": "one word in a peer's memory that says: your data is there",
    "stale (read after write)": "the reader came before the writer, and read the round before",
    "ahead (write after read)": "the writer overwrote what the reader had not read yet",
    "path": "what a gather really did: `symmetric`, `staged` or `fallback`, with the reason",
    "registration": "buffer + group + offset: what must match for the fast path",
    "algbw": "S / t: all gathered bytes by time",
    "busbw": "algbw · (cp−1)/cp: what each link really carries",
    "alpha, beta": "the cost of meeting, µs; the cost of a byte, µs/B: t = alpha + beta · bytes",
    "speed of light": "the time that the hardware alone would need; nothing is faster",
    "warm-up": "runs before the clock starts: memory is there, caches are filled, plans are made",
    "first touch": "the first write into new memory: the kernel must find and clear each page",
    "modelled": "computed from alpha and beta, not measured; figures say so in their title",
    "slowest rank": "a gather is done when its last rank is: its time is that rank's",
}
_LINE = re.compile(r"(?m)^\{glossary: (.+)\}$")


def expand(markdown: str) -> str:
    """Put a table in the place of each glossary line. Raises ValueError for an unknown word."""
    return _LINE.sub(lambda match: table(match[1].split("; ")), markdown)


def table(words: list[str]) -> str:
    """The named words as a markdown table, in the order they are named."""
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"the glossary has no {unknown}; its words are {', '.join(WORDS)}")
    rows = [f"| **{word}** | {WORDS[word]} |" for word in words]
    return "\n".join(["| word | meaning |", "|---|---|", *rows])
