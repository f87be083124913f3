"""The checker must see every kind of wrong row; each mutant is a bug that a gather can have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cpkit import provenance
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata

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


def gathered_by_formula(metadata: ContextParallelMetadata, shape: tuple[int, ...]) -> torch.Tensor:
    return provenance.expected_rows(metadata, shape, torch.int64, round=7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (16,), ()], ids=str)
def test_shards_put_in_order_are_what_is_expected(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    result = torch.empty(METADATA.total_tokens, *shape, dtype=dtype)
    for rank in range(4):
        rows = provenance.shard_rows(METADATA, rank, shape, dtype, round=3, tensor=1)
        for row, token in zip(rows, METADATA.rank_rows(rank).tolist(), strict=True):
            result[token] = row
    assert provenance.explain_mismatch(result, METADATA, round=3, tensor=1) is None


def swap_rows(x: torch.Tensor) -> None:
    x[[3, 4]] = x[[4, 3]]


def stale_row(x: torch.Tensor) -> None:
    x[5] = provenance.expected_rows(METADATA, (4,), torch.int64, round=6)[5]


def padding_leaks(x: torch.Tensor) -> None:
    x[-1] = 0


def nobody_wrote(x: torch.Tensor) -> None:
    provenance.poison_(x[2])


def lane_shifted(x: torch.Tensor) -> None:
    x[8] = x[8].roll(1)


def one_bit(x: torch.Tensor) -> None:
    x[20, 3] ^= 1


def rank_order_instead(x: torch.Tensor) -> None:
    x.copy_(x[METADATA.rank_order])


def wrong_tensor(x: torch.Tensor) -> None:
    x[1] = provenance.expected_rows(METADATA, (4,), torch.int64, round=7, tensor=1)[1]


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (swap_rows, ["slot 3 ", "token 4", "wanted", "token 3", "2 of 34 rows"]),
        (stale_row, ["slot 5 ", "holds round 6", "wanted round 7"]),
        (padding_leaks, ["slot 33 ", "zeros (padding?)", "sequence 2, token 7"]),
        (nobody_wrote, ["slot 2 ", "poison (never written)"]),
        (lane_shifted, ["slot 8 ", "lane 3", "wanted", "lane 0"]),
        (one_bit, ["slot 20 ", "lane 3", "tensor 1;", "1 of 34 rows"]),
        (rank_order_instead, ["slot 2 ", "sequence 1"]),
        (wrong_tensor, ["tensor 1;", "tensor 0 ("]),
    ],
)
def test_every_mutant_is_named(mutant: Callable[[torch.Tensor], None], words: list[str]) -> None:
    result = gathered_by_formula(METADATA, (4,))
    assert provenance.explain_mismatch(result, METADATA, round=7) is None
    mutant(result)
    said = provenance.explain_mismatch(result, METADATA, round=7)
    assert said is not None
    for word in words:
        assert word in said
    with pytest.raises(provenance.ProvenanceError):
        provenance.check(result, METADATA, round=7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_rows_too_short_to_decode_still_differ(dtype: torch.dtype) -> None:
    """One 4-byte row can't carry a stamp, but another round must not look the same."""
    result = provenance.expected_rows(METADATA, (4,), dtype, round=1)
    said = provenance.explain_mismatch(result, METADATA, round=2)
    assert said is not None
    assert "byte 0x" in said


def test_a_wrong_shape_is_said() -> None:
    said = provenance.explain_mismatch(torch.zeros(3, 4), METADATA, round=1)
    assert said == "the result has shape [3, 4]; wanted [34, 4]"


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
