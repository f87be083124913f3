"""The CUDA kernel's index arithmetic, run by Triton's interpreter without a GPU.

One process runs the kernel for all ranks, one after the other, without synchronization.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpkit import provenance
from cpkit.gather import as_rows
from cpkit.kernels import tiles as tiles_module
from cpkit.kernels.tiles import COLUMNS, WIDE_BYTES, tile_table, unit_bytes
from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata

kernels = pytest.importorskip("cpkit.kernels.gather_kernel", reason="triton is not installed")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here (there is a GPU); the gpu tests run the kernel itself",
)

DTYPES = (torch.bfloat16, torch.float64, torch.uint8, torch.bool)
TRAILING = ((4, 8), (3,), (33,), (16,))
BLOCK = 16


def gathered_by_kernel(
    metadata: ContextParallelMetadata,
    shards: list[list[torch.Tensor]],
    heights: int,
    slots: torch.Tensor | None = None,
    margin: int = 0,
) -> list[list[torch.Tensor]]:
    """Return the outputs of every rank, `[heights, lanes]` each, from the shards of every rank.

    With slots, outputs have `margin` more lanes on each side, which the kernel must not touch.
    """
    cp_size = metadata.cp_size
    rows = [[as_rows(x) for x in mine] for mine in shards]
    outputs = [
        [provenance.poison_(x.new_empty(heights, x.shape[1] + 2 * margin)) for x in mine]
        for mine in rows
    ]
    columns = [[y[:, margin : y.shape[1] - margin] for y in mine] for mine in outputs]
    for rank, mine in enumerate(rows):
        row_bytes = [x.shape[1] * x.element_size() for x in mine]
        pitch_bytes = [y.stride(0) * y.element_size() for y in columns[rank]]
        units = [
            unit_bytes(n, x.data_ptr() | y.data_ptr() | pitch)
            for n, x, y, pitch in zip(row_bytes, mine, columns[rank], pitch_bytes, strict=True)
        ]
        narrow = min((u for u in units if u < WIDE_BYTES), default=0)
        tiles = tile_table(
            metadata.runs(rank),
            row_bytes,
            [u == WIDE_BYTES for u in units],
            narrow or 1,
            BLOCK,
            () if slots is None else pitch_bytes,
        )
        tables = [
            torch.tensor([columns[peer][i].data_ptr() for peer in range(cp_size)])
            for i in range(len(mine))
        ]
        launch(rank, cp_size, mine, columns[rank], tables, tiles, slots, narrow)
    return outputs


def launch(
    rank: int,
    cp_size: int,
    rows: list[torch.Tensor],
    own_outputs: list[torch.Tensor],
    tables: list[torch.Tensor],
    tiles: torch.Tensor,
    slots: torch.Tensor | None,
    narrow: int,
) -> None:
    import triton.language as tl

    from cpkit.kernels.launch import NARROW

    words = torch.zeros(kernels.PAGE_WORDS, dtype=torch.int64)
    pages = torch.full((cp_size,), words.data_ptr(), dtype=torch.int64)
    nothing = torch.zeros(1, dtype=torch.int64)
    kernels.gather_kernel[(3,)](
        tuple(x.data_ptr() for x in rows),
        tuple(output.data_ptr() for output in own_outputs),
        tuple(table.data_ptr() for table in tables),
        nothing if slots is None else slots,
        tiles,
        len(tiles),
        words.data_ptr(),
        pages,
        nothing,
        0,
        rank,
        0,
        TENSORS=len(rows),
        CP=cp_size,
        BLOCK=BLOCK,
        NARROW=getattr(tl, NARROW[narrow]) if narrow else None,
        SLOTS=slots is not None,
        ENTRY=False,
        EXIT=False,
        THREADS=32,
    )
    assert not words.any()  # the next kernel expects counters of zero


def shards_of(
    metadata: ContextParallelMetadata, kinds: list[tuple[torch.dtype, tuple[int, ...]]], round: int
) -> list[list[torch.Tensor]]:
    return [
        [
            provenance.shard_rows(metadata, rank, shape, dtype, round=round, tensor=i)
            for i, (dtype, shape) in enumerate(kinds)
        ]
        for rank in range(metadata.cp_size)
    ]


@interpreted
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_every_rank_receives_every_row(strategy: str, cp_size: int) -> None:
    rng = random.Random(f"{strategy} {cp_size}")
    lengths = [rng.randint(2 * cp_size, 2 * cp_size + 9) for _ in range(2)]
    metadata = prepare_context_parallel_metadata(lengths, cp_size, strategy)
    kinds = [(rng.choice(DTYPES), shape) for shape in rng.sample(TRAILING, 2)]
    outputs = gathered_by_kernel(metadata, shards_of(metadata, kinds, 5), metadata.total_tokens)
    for mine in outputs:
        for i, (dtype, shape) in enumerate(kinds):
            got = mine[i].view(torch.uint8).view(dtype).view(-1, *shape)
            provenance.check(got, metadata, round=5, tensor=i)


@interpreted
@pytest.mark.timeout(300)
@pytest.mark.parametrize("margin", [0, 1, 2], ids=["dense", "narrow units", "wide units"])
def test_slots_select_cache_rows_and_minus_one_skips_a_token(margin: int) -> None:
    metadata = prepare_context_parallel_metadata([9, 8], 2)
    slots = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:17]
    slots[[2, 11]] = -1
    kinds = [(torch.bfloat16, (8,)), (torch.uint8, (5,))]
    outputs = gathered_by_kernel(metadata, shards_of(metadata, kinds, 2), 30, slots, margin)
    stored = slots >= 0
    for mine in outputs:
        for i, (dtype, shape) in enumerate(kinds):
            cache = mine[i].view(torch.uint8)
            want = provenance.expected_rows(metadata, shape, dtype, round=2, tensor=i)
            whole, side = torch.full_like(cache, provenance.POISON_BYTE), margin * mine[i].itemsize
            whole[slots[stored], side : whole.shape[1] - side] = want.view(torch.uint8)[stored]
            assert torch.equal(cache, whole)


@interpreted
def test_a_wrong_tile_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one tile's token is off by one."""
    real = tile_table

    def shifted(*args: object, **kwargs: object) -> torch.Tensor:
        table = real(*args, **kwargs)  # type: ignore[arg-type]
        table[-1, COLUMNS.index("token")] -= 1
        return table

    monkeypatch.setitem(globals(), "tile_table", shifted)
    metadata = prepare_context_parallel_metadata([16], 2)
    outputs = gathered_by_kernel(metadata, shards_of(metadata, [(torch.float64, (4,))], 1), 16)
    got = outputs[0][0].view(torch.float64).view(-1, 4)
    with pytest.raises(provenance.ProvenanceError, match="expected round 1"):
        provenance.check(got, metadata, round=1)


def test_the_unit_is_the_widest_that_row_and_address_allow() -> None:
    assert [unit_bytes(2048, 0), unit_bytes(132, 0), unit_bytes(6, 0)] == [16, 4, 1]
    assert [unit_bytes(2048, 8), unit_bytes(2048, 1), unit_bytes(1024, 0 | 1152)] == [4, 1, 16]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(8, 60), min_size=1, max_size=4),
    strategy=st.sampled_from(STRATEGIES),
    row_units=st.integers(1, 7),
    tile_units=st.integers(1, 40),
)
def test_tiles_cover_every_unit_of_a_rank_once(
    lengths: list[int], strategy: str, row_units: int, tile_units: int
) -> None:
    metadata = prepare_context_parallel_metadata(lengths, 4, strategy)
    assert_every_unit_is_covered_once(metadata, row_units, tile_units)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_too_long_for_32_bits_is_cut(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "MAX_RUN_UNITS", 20)
    metadata = prepare_context_parallel_metadata([61, 60], 4, strategy)
    assert_every_unit_is_covered_once(metadata, row_units=3, tile_units=8)
    tiles = tile_table(metadata.runs(0), [3], [False], 1, 8)
    assert (tiles[:, COLUMNS.index("first")] + tiles[:, COLUMNS.index("count")]).max() < 20


def assert_every_unit_is_covered_once(
    metadata: ContextParallelMetadata, row_units: int, tile_units: int
) -> None:
    for rank in range(metadata.cp_size):
        rows = metadata.per_rank_actual_token[rank]
        tiles = tile_table(metadata.runs(rank), [row_units], [False], 1, tile_units)
        seen = torch.zeros(rows * row_units, dtype=torch.int64)
        tokens = torch.full((rows * row_units,), -1)
        for _, _, source, first, count, token, step, units, _ in tiles.tolist():
            assert 0 < count <= tile_units
            place = torch.arange(first, first + count)
            seen[source + place] += 1
            tokens[source + place] = token + place // units * step
        assert (seen == 1).all()
        assert torch.equal(tokens, metadata.rank_rows(rank).repeat_interleave(row_units))
