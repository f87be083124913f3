"""Test rows that encode their origin, so that a check can explain the first wrong row.

A row of the KV cache is cut into 64-bit words (lanes). Each word encodes its round, rank, sequence,
token and lane, and the number of its tensor:

    bits   63-62   61-52   51-44   43-34      33-14   13-4    3-0
           tag 01  round   rank    sequence   token   lane    tensor

A row that is not a multiple of 8 bytes ends in the low bytes of a word whose bits are mixed: they
distinguish two rows, but cannot be decoded. Booleans hold the lowest bit of each byte of a mixed
word. Expected values are computed by this formula alone, never by another collective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cpkit.layout import ContextParallelMetadata

POISON_BYTE = 0xDB
_TAG = 1 << 62
_FIELDS = {
    "tensor": (0, 4),
    "lane": (4, 10),
    "token": (14, 20),
    "sequence": (34, 10),
    "rank": (44, 8),
    "round": (52, 10),
}


class ProvenanceError(AssertionError):
    """A gathered row differs from the expected one."""


def shard_rows(
    metadata: ContextParallelMetadata,
    rank: int,
    trailing_shape: Sequence[int],
    dtype: torch.dtype,
    *,
    round: int,
    tensor: int = 0,
) -> torch.Tensor:
    """Return the stamped rows that `rank` holds, in its order: `[rows, *trailing_shape]`."""
    tokens = metadata.rank_rows(rank)
    ranks = torch.full_like(tokens, rank)
    return _stamp(metadata, tokens, ranks, trailing_shape, dtype, round, tensor)


def expected_rows(
    metadata: ContextParallelMetadata,
    trailing_shape: Sequence[int],
    dtype: torch.dtype,
    *,
    round: int,
    tensor: int = 0,
) -> torch.Tensor:
    """Return the result of a correct gather, in token order: `[total_tokens, *trailing_shape]`."""
    tokens = torch.arange(metadata.total_tokens, device="cpu")
    return _stamp(metadata, tokens, metadata.owners(), trailing_shape, dtype, round, tensor)


def poison_(x: torch.Tensor) -> torch.Tensor:
    """Fill a contiguous tensor with bytes that no stamp contains; return it."""
    if x.numel():
        value = 1 if x.dtype == torch.bool else POISON_BYTE
        x.view(torch.uint8).fill_(value)
    return x


def check(
    got: torch.Tensor, metadata: ContextParallelMetadata, *, round: int, tensor: int = 0
) -> None:
    """Raise ProvenanceError unless `got` (token order) is bit-exact."""
    problem = explain_mismatch(got, metadata, round=round, tensor=tensor)
    if problem:
        raise ProvenanceError(problem)


def explain_mismatch(
    got: torch.Tensor, metadata: ContextParallelMetadata, *, round: int, tensor: int = 0
) -> str | None:
    """Return None when `got` (token order) is bit-exact, otherwise its first wrong byte, decoded.

    slot 37 (of 64) byte 0 holds round 6, rank 2, sequence 1, token 5, lane 0, tensor 0;
    expected round 7, rank 3, … (19 of 64 rows differ)
    """
    want = expected_rows(metadata, got.shape[1:], got.dtype, round=round, tensor=tensor)
    if got.shape != want.shape:
        return f"the result has shape {list(got.shape)}; expected {list(want.shape)}"
    got_bytes, want_bytes = _row_bytes(got.cpu()), _row_bytes(want)
    wrong = (got_bytes != want_bytes).any(1).nonzero().flatten()
    if not len(wrong):
        return None
    slot = int(wrong[0])
    byte = int((got_bytes[slot] != want_bytes[slot]).nonzero()[0])
    return (
        f"slot {slot} (of {len(want)}) byte {byte} holds {_describe(got_bytes[slot], byte)}; "
        f"expected {_describe(want_bytes[slot], byte)} ({len(wrong)} of {len(want)} rows differ)"
    )


def decode_rows(rows: torch.Tensor) -> torch.Tensor:
    """Decode each row: int64 `[rows, 4]` of (round, rank, sequence, token).

    Padding, poison and rows shorter than 8 bytes decode to -1.
    """
    data = _row_bytes(rows.cpu())
    if data.shape[1] < 8 or not len(data):
        return torch.full((len(data), 4), -1, device="cpu")
    words = data[:, :8].contiguous().view(torch.int64).flatten()
    columns = [_field(words, name) for name in ("round", "rank", "sequence", "token")]
    decoded = torch.stack(columns, 1)
    decoded[(words >> 62) != 1] = -1
    return decoded


def _stamp(
    metadata: ContextParallelMetadata,
    tokens: torch.Tensor,
    ranks: torch.Tensor,
    trailing_shape: Sequence[int],
    dtype: torch.dtype,
    round: int,
    tensor: int,
) -> torch.Tensor:
    row_bytes = math.prod(trailing_shape) * dtype.itemsize
    sequences = metadata.sequence_of(tokens)
    starts = torch.tensor(metadata.starts, device="cpu")[sequences]
    head = (
        _TAG
        + _shifted("round", torch.tensor(round, device="cpu"))
        + _shifted("tensor", torch.tensor(tensor, device="cpu"))
        + _shifted("rank", ranks)
        + _shifted("sequence", sequences)
        + _shifted("token", tokens - starts)
    )
    lanes = torch.arange(math.ceil(row_bytes / 8), device="cpu")
    words = head[:, None] + _shifted("lane", lanes[None, :])
    whole = row_bytes // 8
    if dtype == torch.bool:
        words = _mix(words)
    else:
        words[:, whole:] = _mix(words[:, whole:])
    data = words.flatten().view(torch.uint8).view(len(tokens), 8 * len(lanes))[:, :row_bytes]
    if dtype == torch.bool:
        data = data & 1
    # Flat, because torch refuses to view some strides of a tensor without rows as another type.
    return data.flatten().view(dtype).reshape(len(tokens), *trailing_shape)


def _shifted(name: str, value: torch.Tensor) -> torch.Tensor:
    shift, width = _FIELDS[name]
    return (value % (1 << width)) << shift


def _field(words: torch.Tensor, name: str) -> torch.Tensor:
    shift, width = _FIELDS[name]
    return (words >> shift) & ((1 << width) - 1)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Spread every bit of a word over its low bytes (the finalizer of splitmix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        words = (words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def _row_bytes(x: torch.Tensor) -> torch.Tensor:
    """View any tensor as its bytes: uint8 `[rows, bytes]`."""
    rows = x.shape[0]
    if x.numel() == 0:
        return torch.empty(rows, 0, dtype=torch.uint8, device="cpu")
    return x.contiguous().reshape(-1).view(torch.uint8).reshape(rows, -1)


def _describe(row: torch.Tensor, byte: int) -> str:
    """Describe the 64-bit word that contains a byte of a row; in a shorter rest, the byte."""
    first = byte // 8 * 8
    value = int(row[byte])
    if first + 8 > len(row):
        return f"byte 0x{value:02x}"
    word = row[first : first + 8].clone().view(torch.int64)
    if bool((row[first : first + 8] == POISON_BYTE).all()):
        return "poison (never written)"
    if int(word) == 0:
        return "zeros (padding?)"
    if int(word) >> 62 != 1:
        return f"0x{int(word) & (2**64 - 1):016x} (no stamp)"
    fields = ("round", "rank", "sequence", "token", "lane", "tensor")
    return ", ".join(f"{name} {int(_field(word, name))}" for name in fields)
