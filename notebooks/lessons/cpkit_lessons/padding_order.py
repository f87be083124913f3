"""Notebook 1, exercises 6 and 7: attention needs the right order, and a check must see it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn import functional

from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.provenance import decode_rows
from cpkit_lessons import rows
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.padding_questions import LESSON

Rows = npt.NDArray[np.int64]  # [slots, 4]: round, rank, sequence, token
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Accepts = Callable[[list[tuple[int, ...]], list[int], list[int], int], bool]
TOLERANCE = 1e-12  # float64; the data are of size 1


@LESSON.exercise("e6", "context-parallel attention")
def check_cp_attention(cp_attention: Attention) -> Score:
    """Every rank's outputs equal those of one device that computes the whole sequence."""
    cases, largest = 0, 0.0
    for layout in (prepare_context_parallel_metadata([n], cp, s) for n, cp, s in _sequences()):
        torch.manual_seed(layout.total_tokens)
        q, k, v = torch.randn(3, 2, layout.total_tokens, 8, dtype=torch.float64)
        whole = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        for rank in range(layout.cp_size):
            tokens = layout.rank_rows(rank)
            got = cp_attention(q[:, tokens], k.clone(), v.clone(), tokens.clone())
            largest = max(largest, _output_error(got, whole[:, tokens], layout, rank))
            cases += 1
    return Score(cases, note=f"largest error below {TOLERANCE:g}" if largest < TOLERANCE else "")


def _sequences() -> Iterator[tuple[int, int, str]]:
    for strategy in ("zigzag", "interleave", "contiguous"):
        yield from ((length, cp_size, strategy) for length in (8, 13, 24) for cp_size in (1, 2, 4))


def _output_error(
    got: object, want: torch.Tensor, layout: ContextParallelMetadata, rank: int
) -> float:
    where = f"{layout.total_tokens} tokens, {layout.strategy}, rank {rank} of {layout.cp_size}"
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        shape = list(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise Wrong(
            f"{where}: the output is {shape}; wanted [heads, rows, dim] = {list(want.shape)}"
        )
    errors = torch.nan_to_num(got - want, nan=torch.inf).abs().amax((0, 2))
    wrong = (errors > TOLERANCE).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        token = int(layout.rank_rows(rank)[row])
        keys = f"keys 0 to {token}" if token else "key 0"
        raise Wrong(
            f"{where}: row {row} is token {token}, which looks at {keys} and at no other; its "
            f"output is off by {float(errors[row]):.2f} ({len(wrong)} of {len(errors)} rows are "
            "wrong)"
        )
    return float(errors.max()) if len(errors) else 0.0


# ------------------------------------------------------------------------------ broken gathers


@LESSON.exercise("e7", "write the check")
def check_accepts(accepts: Accepts) -> Score:
    """Right gathers must be accepted, and every broken one refused, over random batches."""
    cases = refused = 0
    for round_, layout in rows.rounds(_batches()):
        for name, got in broken_gathers(layout, round_).items():
            owners, lengths = layout.owners().tolist(), list(layout.lengths)
            told = accepts([tuple(row) for row in got.tolist()], lengths, owners, round_)
            if bool(told) != (name == "right"):
                where = f"lengths {lengths}, cp_size {layout.cp_size}, round {round_}"
                if name == "right":
                    raise Wrong(f"your check refuses a right gather: {where}")
                fault = _first_fault(got, layout, round_)
                raise Wrong(f"`{name}` survives: {where}. {fault}, and your check accepts it")
            cases, refused = cases + 1, refused + (name != "right")
    return Score(cases, {"mutants killed": (refused, refused)})


def broken_gathers(layout: ContextParallelMetadata, round_: int) -> dict[str, Rows]:
    """What a right gather and eight broken ones leave in token order, as decoded rows."""
    draw = random.Random(round_)
    right = decode_rows(rows.token_order(layout, round_)).numpy()
    owner = right[:, 1]
    one, other = draw.sample(range(layout.cp_size), 2)
    at = draw.randrange(len(right) - 1)
    made = {name: right.copy() for name in MUTANTS}
    made["two ranks exchanged"] = _exchanged(right, one, other)
    made["rank order: reorder forgotten"] = right[layout.rank_order.numpy()]
    made["stale: one rank's last round"][owner == one, 0] = round_ - 1
    made["padding in the place of a row"][at] = -1
    made["a row twice"][at + 1] = right[at]
    made["two neighbours exchanged"][[at, at + 1]] = right[[at + 1, at]]
    made["written by a rank that is not the owner"][owner == one, 1] = other
    made["the last row lost"] = right[:-1]
    return {"right": right, **made}


MUTANTS = (
    "two ranks exchanged",
    "rank order: reorder forgotten",
    "stale: one rank's last round",
    "padding in the place of a row",
    "a row twice",
    "two neighbours exchanged",
    "written by a rank that is not the owner",
    "the last row lost",
)


def _exchanged(right: Rows, one: int, other: int) -> Rows:
    """The rows of two ranks in each other's places, as far as both have rows."""
    got = right.copy()
    mine, theirs = np.flatnonzero(right[:, 1] == one), np.flatnonzero(right[:, 1] == other)
    count = min(len(mine), len(theirs))
    got[mine[:count]], got[theirs[:count]] = right[theirs[:count]], right[mine[:count]]
    return got


def _batches() -> Iterator[ContextParallelMetadata]:
    draw = random.Random(11)
    for _ in range(20):
        cp_size = draw.randint(2, 4)
        lengths = [draw.randint(2 * cp_size, 20) for _ in range(draw.randint(1, 3))]
        yield prepare_context_parallel_metadata(lengths, cp_size, "zigzag")


def _first_fault(got: Rows, layout: ContextParallelMetadata, round_: int) -> str:
    want = decode_rows(rows.token_order(layout, round_))
    for slot, row in enumerate(want):
        held = rows.words(torch.from_numpy(got[slot])) if slot < len(got) else "nothing"
        if held != rows.words(row):
            return f"Slot {slot} holds {held}; wanted {rows.words(row)}"
    return ""


# ---------------------------------------------------------------- checks as they are often seen

WEAK_CHECKS: Mapping[str, Callable[[Rows, Rows], bool]] = {
    "lengths only": lambda got, want: len(got) == len(want),
    "one constant a rank": lambda got, want: _equal(got[:, 1], want[:, 1]),
    "the same set of tokens": lambda got, want: (
        set(map(tuple, got[:, 2:])) == set(map(tuple, want[:, 2:]))
    ),
    "tokens in order": lambda got, want: _equal(got[:, 2:], want[:, 2:]),
}


def _equal(got: Rows, want: Rows) -> bool:
    return got.shape == want.shape and bool((got == want).all())


def kill_table(layout: ContextParallelMetadata, round_: int) -> pd.DataFrame:
    """Every weak check against every broken gather: ✓ killed, or `alive`."""
    gathers = broken_gathers(layout, round_)
    want = gathers.pop("right")
    return pd.DataFrame(
        {
            check: ["alive" if accepts(got, want) else "✓ killed" for got in gathers.values()]
            for check, accepts in WEAK_CHECKS.items()
        },
        index=pd.Index(list(gathers), name="broken gather"),
    )
