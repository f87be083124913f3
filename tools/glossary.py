"""The glossary of the notebooks: each word explained once.

A line `{glossary: token, row; rank order}` in a notebook's source becomes a table of these words.
"""

from __future__ import annotations

import re

WORDS: dict[str, str] = {
    "token, row": "one position of the KV cache; a row is its `[heads, head_dim]` slice",
    "cp_size, cp_rank": "the number of ranks that share the batch; the index of this rank",
    "strategy": "which rank owns which token: `zigzag`, `interleave` or `contiguous`",
    "block": "one of 2·cp parts of a sequence (zigzag); rank r owns blocks r and 2·cp−1−r",
    "per_rank_actual_token": "rows that each rank holds, without padding",
    "max_rank_len": "rows of each rank after padding: the maximum over ranks",
    "rank order": "rank 0's rows, then rank 1's, …: the result without the padding",
    "token order": "token 0, 1, 2, …, sequence by sequence: the order that attention needs",
    "reorganize, rerange": "upstream's names: strip → rank order; reorder → token order",
    "provenance": "the origin that is stored in each row: round, rank, sequence, token",
    "poison": "bytes that fill a buffer before it is used, so that unwritten rows are detected",
    "mutant": "a deliberately wrong solution; a good check rejects all of them",
    "pass": "reading and writing all gathered data once",
    "symmetric memory": "a buffer that all ranks allocated alike and all peers can address",
    "segment": "one registered allocation: all ranks made it, and all ranks mapped it",
    "arena, pool": "the large segment allocated at startup; the allocator that divides it",
    "spill": "an allocation that did not fit the arena and registered a new segment at run time",
    "put, get": "write into a peer's memory; read from it",
    "barrier": "a point that no rank passes before all ranks have arrived",
    "signal": "a flag in a peer's memory: set means that the data has arrived",
    "stale (read after write)": "the reader was early, and read the previous round",
    "ahead (write after read)": "the writer was early, and overwrote rows that were not read yet",
    "path": "how a gather moved its data: `symmetric`, `staged` or `fallback`, with the reason",
    "registration": "buffer, group and offset, which must match for the fast path",
    "algbw": "S / t: all gathered bytes divided by the time",
    "busbw": "algbw · (cp−1)/cp: the rate at which a link carries data",
    "alpha, beta": "fixed cost, µs, and cost per byte, µs/B: t = alpha + beta · bytes",
    "speed of light": "the least time that the hardware allows",
    "warm-up": "iterations before the clock starts: they allocate memory, fill caches, make plans",
    "first touch": "the first write into new memory: the kernel allocates and clears each page",
    "modelled": "computed from alpha and beta, not measured; figures say so in their title",
    "slowest rank": "the rank that finishes last; its time is the time of the gather",
}
_LINE = re.compile(r"(?m)^\{glossary: (.+)\}$")


def expand(markdown: str) -> str:
    """Replace each glossary line by a table. Raises ValueError for an unknown word."""
    return _LINE.sub(lambda match: table(match[1].split("; ")), markdown)


def table(words: list[str]) -> str:
    """Return a markdown table of the given words, in their order."""
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"the glossary has no {unknown}; its words are {', '.join(WORDS)}")
    rows = [f"| **{word}** | {WORDS[word]} |" for word in words]
    return "\n".join(["| word | meaning |", "|---|---|", *rows])
