"""Gathers with one planted bug each. The fuzz test must detect all of them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.fuzz.case import Case
from cpkit import gather
from cpkit.layout import Runs
from cpkit.memory import posix
from cpkit.memory.pool import SymmetricPool
from cpkit.memory.posix import PosixBackend
from tests.ranks.fuzz import run
from tests.ranks.mutants import planted


def expect(words: str, **fields: object) -> None:
    """Expect a failure with these words within the first cases that have these fields."""

    def wanted(case: Case) -> bool:
        return not case.fault and all(
            getattr(case, name) == value for name, value in fields.items()
        )

    said = [failure["problem"] for failure in run(40, wanted).failures]
    assert any(words in each for each in said), said


def check_fuzz_detects_a_tile_with_the_rows_of_another() -> None:
    def first_again(real: Any, *args: Any) -> Runs:
        pieces: Runs = real(*args)
        return pieces._replace(row=pieces.row.clip(max=0))

    with planted(posix, "tiles", first_again):
        expect("the row is token", algorithm="direct", strategy="contiguous")


def check_fuzz_detects_a_dropped_last_row() -> None:
    def shorter(real: Any, *args: Any) -> Runs:
        pieces: Runs = real(*args)
        length = pieces.length.copy()
        length[-1:] -= 1
        return pieces._replace(length=length)

    with planted(posix, "tiles", shorter):
        expect("poison (never written)", algorithm="direct", strategy="zigzag", call="gather")


def check_fuzz_detects_padding_that_leaks() -> None:
    def unstripped(real: Any, gathered: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return gathered[: sum(rows)]

    with planted(gather, "strip_padding", unstripped):
        expect("zeros (padding?)", algorithm="padded", call="gather")


def check_fuzz_detects_swapped_zigzag_blocks() -> None:
    def swapped(real: Any, rows: torch.Tensor, metadata: Any) -> torch.Tensor:
        if metadata.strategy != "zigzag":
            return real(rows, metadata)
        blocks = list(real(rows, metadata).split(metadata.split_list))
        return torch.cat([*blocks[1::-1], *blocks[2:]])

    with planted(gather, "reorder_tokens", swapped):
        expect("the row is token", algorithm="padded_symm", strategy="zigzag", symmetric=True)


def check_fuzz_detects_slots_that_are_off_by_one() -> None:
    def before(real: Any, *args: Any) -> None:
        *others, slots = args
        real(*others, torch.where(slots > 0, slots - 1, slots))

    with planted(PosixBackend, "_push_into_slots", before):
        expect("the row is token", call="into", algorithm="direct", symmetric=True)


def check_fuzz_detects_a_lane_that_is_too_wide() -> None:
    def whole_words(real: Any, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = real(x)
        if not rows.numel():
            return rows
        data = rows.contiguous().view(torch.uint8).clone()
        data[:, data.shape[1] // 8 * 8 :] = 0
        return data.view(rows.dtype)

    with planted(gather, "as_rows", whole_words):
        expect("element", call="gather", algorithm="padded")


def check_fuzz_detects_a_block_that_is_freed_too_early() -> None:
    def by_rank_0(real: Any, pool: Any, states: list[bytes]) -> None:
        real(pool, states[:1])

    with planted(SymmetricPool, "_free_agreed", by_rank_0):
        expect("of gather", call="gather", algorithm="direct", symmetric=True, gathers=3)


def check_fuzz_detects_a_plan_with_one_output() -> None:
    def shared(real: Any, backend: Any, pool: Any, rows: Any, sets: list[Any], *layout: Any) -> Any:
        sets[:] = sets[:1] * len(sets)
        return real(backend, pool, rows, sets, *layout)

    with planted(PosixBackend, "prepare", shared):
        expect("of gather", call="plan", algorithm="direct", keep=2, symmetric=True)
