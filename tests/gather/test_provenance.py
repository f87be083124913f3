"""The check of stamped rows names every kind of wrong row that a faulty gather can produce."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from cpkit import provenance
from cpkit.layout import prepare_context_parallel_metadata

METADATA = prepare_context_parallel_metadata([9, 17, 8], 4)
DTYPES = (
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (16,), ()], ids=str)
def test_shards_in_token_order_are_the_expected_rows(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    result = torch.empty(METADATA.total_tokens, *shape, dtype=dtype)
    for rank in range(4):
        rows = provenance.shard_rows(METADATA, rank, shape, dtype, round=3, tensor=1)
        for row, token in zip(rows, METADATA.rank_rows(rank).tolist(), strict=True):
            result[token] = row
    assert provenance.explain_mismatch(result, METADATA, round=3, tensor=1) is None


@pytest.mark.parametrize("shape", [(2, 3), (3,), ()], ids=str)
def test_a_rank_without_rows_has_none(shape: tuple[int, ...]) -> None:
    metadata = prepare_context_parallel_metadata([1], 4, "contiguous")
    idle = metadata.per_rank_actual_token.index(0)
    for dtype in DTYPES:
        rows = provenance.shard_rows(metadata, idle, shape, dtype, round=3)
        assert (rows.shape, rows.dtype) == ((0, *shape), dtype)


def rows_of(**stamp: int) -> torch.Tensor:
    return provenance.expected_rows(METADATA, (4,), torch.int64, **{"round": 7, **stamp})


@pytest.mark.parametrize(
    ("where", "damage", "words"),
    [
        (
            [3, 4],
            lambda x: x[[4, 3]],
            ["slot 3 ", "token 4", "expected", "token 3", "2 of 34 rows"],
        ),
        ([5], lambda x: rows_of(round=6)[[5]], ["slot 5 ", "holds round 6", "expected round 7"]),
        ([33], torch.zeros_like, ["slot 33 ", "zeros (padding?)", "sequence 2, token 7"]),
        ([2], provenance.poison_, ["slot 2 ", "poison (never written)"]),
        ([8], lambda x: x[[8]].roll(1, 1), ["slot 8 ", "lane 3", "expected", "lane 0"]),
        ([20], lambda x: x[[20]] ^ torch.tensor([0, 0, 0, 1]), ["slot 20 ", "lane 3", "tensor 1;"]),
        (range(34), lambda x: x[METADATA.rank_order], ["slot 2 ", "sequence 1"]),
        ([1], lambda x: rows_of(tensor=1)[[1]], ["tensor 1;", "tensor 0 ("]),
    ],
    ids=["swapped", "stale", "padding", "unwritten", "shifted", "bit", "order", "tensor"],
)
def test_every_kind_of_damage_is_named(
    where: Sequence[int], damage: Callable[[torch.Tensor], torch.Tensor], words: list[str]
) -> None:
    result = rows_of()
    assert provenance.explain_mismatch(result, METADATA, round=7) is None
    damaged = damage(result.clone())
    result[list(where)] = damaged if len(damaged) == len(where) else damaged[list(where)]
    said = provenance.explain_mismatch(result, METADATA, round=7)
    for word in words:
        assert word in said
    with pytest.raises(provenance.ProvenanceError):
        provenance.check(result, METADATA, round=7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_rows_too_short_to_decode_still_differ(dtype: torch.dtype) -> None:
    """A row of 4 bytes has no room for a stamp, but rows of two rounds must differ."""
    result = provenance.expected_rows(METADATA, (4,), dtype, round=1)
    said = provenance.explain_mismatch(result, METADATA, round=2)
    assert "byte 0x" in said


def test_a_wrong_shape_is_named() -> None:
    said = provenance.explain_mismatch(torch.zeros(3, 4), METADATA, round=1)
    assert said == "the result has shape [3, 4]; expected [34, 4]"


def test_decode_rows_reads_back_the_stamp() -> None:
    rows = provenance.shard_rows(METADATA, 2, (8,), torch.float32, round=5)
    decoded = provenance.decode_rows(rows)
    tokens = METADATA.rank_rows(2)
    sequences = METADATA.sequence_of(tokens)
    starts = torch.tensor([0, 9, 26])[sequences]
    want = torch.stack(
        [torch.full_like(tokens, 5), torch.full_like(tokens, 2), sequences, tokens - starts], 1
    )
    assert torch.equal(decoded, want)
    assert (provenance.decode_rows(provenance.poison_(torch.empty(2, 8))) == -1).all()
    assert (provenance.decode_rows(torch.zeros(2, 8)) == -1).all()
