"""The glossary of the notebooks: each term is explained once.

A line `{glossary: token, row; rank order}` in a notebook's source becomes a table of these words.
"""

from __future__ import annotations

import re

WORDS: dict[str, str] = {
    "rank, collective": "one process of the group; an operation that all ranks call together",
    "token, row": "one position of the KV cache; a row is its `[heads, head_dim]` slice",
    "shard": "the rows that one rank holds before the gather",
    "slot": "room for one row in a buffer; a slot without a row is padding",
    "cp_size, cp_rank": "the number of ranks that share the batch; the index of this rank",
    "block": "one of the 2·cp_size parts into which the zigzag strategy (section 1) cuts a "
    "sequence; rank r owns blocks r and 2·cp_size−1−r",
    "per_rank_actual_token": "the number of rows that each rank holds, without padding",
    "max_rank_len": "the number of rows of each rank after padding: the maximum over ranks "
    "(`layout.max_rank_len` is a list that repeats it for every rank)",
    "rank order": "all rows of rank 0, then all rows of rank 1, …, without padding",
    "token order": "token 0, 1, 2, …, sequence by sequence: the order that attention needs",
    "provenance": "the origin of a row, stored in the row as a *stamp*: round (the number of the "
    "gather), rank, sequence and token",
    "layout": "where each row is, computed from the lengths, cp_size and the strategy",
    "mutant": "a deliberately wrong solution or result; a good check rejects all of them",
    "pass": "reading and writing all gathered data once",
    "plan": "a gather that is prepared once and then called many times (`plan_gather_kv`)",
    "symmetric memory": "buffers that all ranks allocate with the same sizes in the same order, "
    "and that all peers can address",
    "segment": "memory that one rank creates and all ranks map",
    "arena, pool": "the large segment allocated at startup; the allocator that divides it",
    "spill": "an allocation that fits into no existing segment of the pool, so each rank creates "
    "a new segment",
    "window": "NCCL's name for a buffer that is registered with one group for symmetric kernels",
    "put, get": "write into a peer's memory; read from it",
    "barrier": "a point that no rank passes before all ranks have arrived",
    "signal": "a flag in a peer's memory: one rank sets it, the peer waits for it and clears it",
    "stale (read after write)": "the reader was early, and read rows of an earlier round, or "
    "memory that had not been written yet",
    "ahead (write after read)": "the writer was early, and overwrote rows that had not been read "
    "yet",
    "fallback": "the ordinary collective instead of symmetric kernels: its result is correct, but "
    "it can be slower",
    "ring": "NCCL's ordinary all-gather: each rank passes rows on to its neighbour",
    "symmetric kernel": "a kernel of NCCL that stores straight into the windows of all peers "
    "(small messages: into a staging buffer)",
    "multicast": "one store that the NVLink switch copies to all GPUs; more than 2 ranks needed",
    "copy engine": "the hardware of a GPU that copies memory without its multiprocessors",
    "paged cache": "a KV cache in pages that are assigned to requests; a token's slot can be in "
    "any page",
    "algbw": "S / t: all gathered bytes divided by the time",
    "busbw": "algbw · (cp−1)/cp: the rate at which a link carries data",
    "alpha, beta": "fixed cost, µs, and cost per byte, µs/B: t = alpha + beta · bytes",
    "speed of light": "the least time that the hardware allows",
    "warm-up": "iterations before the clock starts: they allocate memory, fill caches, make plans",
    "first touch": "the first write into new memory, when the operating system allocates and "
    "clears pages",
    "skew": "the difference between the times at which ranks arrive or finish",
    "modelled": "computed from alpha and beta, not measured; figures say so in their title",
    "slowest rank": "the rank with the longest time from start to end; this time is the time of "
    "the gather",
    "eager": "called from Python one operation after the other, without a CUDA graph",
    "CUDA graph": "kernels that were recorded once and are then launched together",
    "call time": "from the start of a call to the end of its kernels, measured in a Python loop",
    "device time": "the time of the work on the GPU alone, without Python",
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
