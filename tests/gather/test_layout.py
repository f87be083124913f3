"""The permutation `rank_rows` is the specification: all lists and formulas follow from it."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpkit import provenance
from cpkit.gather import _token_order_on
from cpkit.kernels.tiles import tile_table
from cpkit.layout import (
    STRATEGIES,
    ContextParallelMetadata,
    can_cp_split,
    prepare_context_parallel_metadata,
    shard,
)
from cpkit.memory.posix import tiles


@st.composite
def layouts(draw: st.DrawFn, strategies: tuple[str, ...] = STRATEGIES) -> ContextParallelMetadata:
    """Draw a batch that the strategy accepts."""
    strategy = draw(st.sampled_from(strategies))
    cp_size = draw(st.integers(1, 9))
    shortest = 2 * cp_size if strategy == "zigzag" and cp_size > 1 else 1
    lengths = draw(st.lists(st.integers(shortest, shortest + 70), min_size=1, max_size=6))
    return prepare_context_parallel_metadata(lengths, cp_size, strategy)


def owner_by_definition(metadata: ContextParallelMetadata) -> list[int]:
    """Return the owner of each token, from the one-line definitions of the strategies."""
    owners = []
    cp_size, flat = metadata.cp_size, 0
    for length in metadata.lengths:
        for token in range(length):
            if metadata.strategy == "interleave":
                owners.append(flat % cp_size)
            elif metadata.strategy == "contiguous":
                owners.append(
                    next(r for r in range(cp_size) if token < length * (r + 1) // cp_size)
                )
            else:
                size, longer = divmod(length, 2 * cp_size)
                edges = [b * size + min(b, longer) for b in range(1, 2 * cp_size + 1)]
                block = next(b for b, edge in enumerate(edges) if token < edge)
                owners.append(min(block, 2 * cp_size - 1 - block))
            flat += 1
    return owners


@given(layouts())
def test_rank_rows_are_a_bijection(metadata: ContextParallelMetadata) -> None:
    rows = torch.cat([metadata.rank_rows(rank) for rank in range(metadata.cp_size)])
    assert rows.dtype == torch.int64
    assert sorted(rows.tolist()) == list(range(metadata.total_tokens))


@given(layouts())
def test_owners_match_the_definition(metadata: ContextParallelMetadata) -> None:
    assert metadata.owners().tolist() == owner_by_definition(metadata)


@given(layouts())
def test_lengths_follow_from_the_permutation(metadata: ContextParallelMetadata) -> None:
    rows = [len(metadata.rank_rows(rank)) for rank in range(metadata.cp_size)]
    assert metadata.per_rank_actual_token == tuple(rows)
    assert metadata.max_rank_len == (max(rows),) * metadata.cp_size
    assert sum(rows) == metadata.total_tokens == sum(metadata.lengths)


@given(layouts())
def test_runs_expand_to_rank_rows(metadata: ContextParallelMetadata) -> None:
    for rank in range(metadata.cp_size):
        spelled = [
            (row + i, token + i * step)
            for row, token, step, length in zip(*metadata.runs(rank), strict=True)
            for i in range(length)
        ]
        assert spelled == list(enumerate(metadata.rank_rows(rank).tolist()))


@given(layouts())
def test_token_order_undoes_rank_order(metadata: ContextParallelMetadata) -> None:
    x = torch.arange(metadata.total_tokens)
    in_rank_order = torch.cat([shard(x, metadata, rank) for rank in range(metadata.cp_size)])
    assert torch.equal(in_rank_order, metadata.rank_order)
    assert torch.equal(in_rank_order[metadata.token_order], x)


@given(layouts(strategies=("zigzag",)))
def test_upstreams_zigzag_lists_restore_token_order(metadata: ContextParallelMetadata) -> None:
    x = torch.arange(metadata.total_tokens)
    blocks = x.split(metadata.split_list)
    for rank in range(metadata.cp_size):
        held = torch.cat([blocks[block] for block in metadata.zigzag_index(rank)])
        assert torch.equal(held, shard(x, metadata, rank))
    in_rank_order = torch.cat([shard(x, metadata, rank) for rank in range(metadata.cp_size)])
    pieces = in_rank_order.split(metadata.reverse_split_len)
    assert torch.equal(torch.cat([pieces[i] for i in metadata.cp_reverse_index]), x)
    assert sorted(metadata.cp_reverse_index) == list(range(len(pieces)))


def test_zigzag_of_one_sequence_by_hand() -> None:
    metadata = prepare_context_parallel_metadata([10], 2)
    assert metadata.split_list == (3, 3, 2, 2)
    assert metadata.rank_rows(0).tolist() == [0, 1, 2, 8, 9]
    assert metadata.rank_rows(1).tolist() == [3, 4, 5, 6, 7]
    assert metadata.zigzag_index(0) == (0, 3)
    assert metadata.reverse_split_len == (3, 2, 3, 2)
    assert metadata.cp_reverse_index == (0, 2, 3, 1)


def test_several_sequences_need_more_rows_than_the_seeds_formula() -> None:
    metadata = prepare_context_parallel_metadata([4097] * 16, 4)
    assert metadata.per_rank_actual_token == (16400, 16384, 16384, 16384)
    assert -(-metadata.total_tokens // 4) == 16388
    assert metadata.max_rank_len == (16400,) * 4


@given(st.integers(1, 9), st.integers(0, 80))
def test_one_sequence_fits_the_seeds_formula(cp_size: int, more: int) -> None:
    metadata = prepare_context_parallel_metadata([2 * cp_size + more], cp_size)
    assert metadata.max_rank_len[0] == -(-metadata.total_tokens // cp_size)


def test_lengths_may_be_numbers_of_other_libraries() -> None:
    metadata = prepare_context_parallel_metadata(torch.tensor([9, 8]), 2)  # type: ignore[arg-type]
    assert metadata.lengths == (9, 8)
    assert all(type(length) is int for length in metadata.lengths)


def test_a_single_rank_accepts_one_token() -> None:
    assert prepare_context_parallel_metadata([1, 3], 1).rank_rows(0).tolist() == [0, 1, 2, 3]


def test_ranks_may_hold_no_rows() -> None:
    interleaved = prepare_context_parallel_metadata([2], 4, "interleave")
    assert interleaved.per_rank_actual_token == (1, 1, 0, 0)
    empty = prepare_context_parallel_metadata([1], 3, "contiguous")
    assert sum(empty.per_rank_actual_token) == 1
    assert shard(torch.zeros(1, 4), empty, 0).shape[0] == empty.per_rank_actual_token[0]


@pytest.mark.parametrize(
    ("lengths", "cp_size", "strategy", "expected"),
    [
        ([8], 4, "zigzag", True),
        ([100], 1, "zigzag", False),
        ([7], 4, "zigzag", False),
        ([100, 7], 4, "zigzag", False),
        ([1, 1, 2], 4, "interleave", True),
        ([3], 4, "interleave", False),
        ([4, 5], 4, "contiguous", True),
        ([4, 3], 4, "contiguous", False),
    ],
)
def test_can_cp_split(lengths: list[int], cp_size: int, strategy: str, expected: bool) -> None:
    assert can_cp_split(lengths, cp_size, strategy) is expected


@pytest.mark.parametrize(
    ("lengths", "cp_size", "strategy", "words"),
    [
        ([], 2, "zigzag", ["lengths is []", "at least one sequence"]),
        ([5, 0], 2, "interleave", ["lengths is [5, 0]", "at least one token"]),
        ([-3], 2, "contiguous", ["lengths is [-3]"]),
        ([2.5], 2, "contiguous", ["lengths is [2.5]"]),
        ([8, True], 2, "contiguous", ["lengths is [8, True]"]),
        ("8", 2, "contiguous", ["lengths is '8'"]),
        ([1 << 70], 2, "contiguous", ["at most 2**48 tokens"]),
        (7, 2, "zigzag", ["lengths is 7"]),
        ([8], 0, "zigzag", ["cp_size is 0", "1 or more"]),
        ([8], -2, "zigzag", ["cp_size is -2"]),
        ([8], 2, "zigzags", ["strategy is 'zigzags'", "zigzag, interleave, contiguous"]),
        ([100, 7], 4, "zigzag", ["8 blocks", "has 7 tokens", "cp_size=1", "interleave"]),
    ],
)
def test_bad_input_is_refused_with_the_value_and_an_alternative(
    lengths: object, cp_size: int, strategy: str, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        prepare_context_parallel_metadata(lengths, cp_size, strategy)  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)
    if "blocks" not in str(error.value):
        with pytest.raises(ValueError, match=r"lengths|cp_size|strategy"):
            ContextParallelMetadata(lengths, cp_size, strategy)  # type: ignore[arg-type]


def test_shard_needs_the_whole_batch() -> None:
    metadata = prepare_context_parallel_metadata([8], 2)
    with pytest.raises(ValueError, match="8 tokens"):
        shard(torch.zeros(7, 2), metadata, 0)
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        shard(torch.zeros(8, 2), metadata, 2)
    with pytest.raises(ValueError, match="rank_rows"):
        prepare_context_parallel_metadata([8], 2, "interleave").zigzag_index(0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_default_device_of_torch_changes_no_layout(strategy: str) -> None:
    """Layouts, stamps and tiles are created on the CPU, whatever the default device is."""
    metadata = prepare_context_parallel_metadata([29, 17], 2, strategy)
    with torch.device("meta"):
        made = (
            metadata.rank_rows(1),
            metadata.owners(),
            metadata.token_order,
            provenance.shard_rows(metadata, 0, (3,), torch.float32, round=1),
            tile_table(metadata.runs(0), [12], [False], 4, 5),
        )
        decoded = provenance.decode_rows(made[3])
    assert {x.device.type for x in (*made, decoded)} == {"cpu"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_caller_can_change_the_layout_of_another(strategy: str) -> None:
    """Layouts are cached: the next call with these lengths returns the same object."""
    metadata = prepare_context_parallel_metadata([9, 8], 2, strategy)
    want = metadata.rank_rows(0).tolist(), metadata.token_order.tolist()
    for made in (metadata.rank_rows(0), metadata.rank_order, metadata.token_order):
        made.fill_(-1)
    for field in metadata.runs(0):
        with pytest.raises(ValueError, match="read-only"):
            field[0] = 7
    names = ["lengths", "per_rank_actual_token", "max_rank_len", "starts"]
    names += ["split_list", "reverse_split_len", "cp_reverse_index"] * (strategy == "zigzag")
    assert all(type(getattr(metadata, name)) is tuple for name in names)
    again = prepare_context_parallel_metadata([9, 8], 2, strategy)
    assert again is metadata
    assert (again.rank_rows(0).tolist(), again.token_order.tolist()) == want


@pytest.mark.parametrize("order", ["rank_order", "token_order"])
def test_a_layout_first_read_in_inference_mode_works_with_autograd(order: str) -> None:
    metadata = prepare_context_parallel_metadata([7, 13, 41], 2, "interleave")
    with torch.inference_mode():
        getattr(metadata, order)
        _token_order_on(metadata, torch.device("cpu"))
    x = torch.ones(61, requires_grad=True)
    (x[getattr(metadata, order)] + x[_token_order_on(metadata, x.device)]).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 61


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layout_needs_no_python_work_per_sequence(strategy: str) -> None:
    """A serving engine computes the layout of a new batch for every forward pass."""

    def calls(sequences: int) -> int:
        """Return the number of Python and C functions called for one new layout."""
        made = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        lengths = [64] * (sequences - 1) + [65]
        gc.collect()
        gc.disable()  # finalizers of other tests' objects would be counted
        sys.setprofile(count)
        try:
            metadata = prepare_context_parallel_metadata(lengths, 4, strategy)
            assert metadata.starts
            assert metadata.max_rank_len
            metadata.rank_rows(1)
            tiles(metadata, 1, 1152)
            tile_table(metadata.runs(1), [1152], [True], 4, 4096)
            if strategy == "zigzag":
                assert metadata.cp_reverse_index
                assert metadata.reverse_split_len
        finally:
            sys.setprofile(None)
            gc.enable()
        return made

    assert calls(4000) == calls(40)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layout_is_made_and_used_first_inside_a_compiled_function(strategy: str) -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        metadata = prepare_context_parallel_metadata([41, 4], 2, strategy)
        return shard(x, metadata, 1) + metadata.owners()[0]

    x = torch.arange(45.0)
    compiled = torch.compile(layer, backend="eager")(x)
    assert torch.equal(compiled, layer(x))
