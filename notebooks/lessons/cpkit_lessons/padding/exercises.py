"""Notebook 1: the checks of its exercises, in the order of the notebook."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn import functional

from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.provenance import decode_rows
from cpkit_lessons import guard, rows
from cpkit_lessons.copy_counter import CopyCounter
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.padding.questions import LESSON
from cpkit_lessons.rows import ROW_BYTES, describe_layout

Owner = Callable[[int, int, int], int]
KeysSeen = Callable[[torch.Tensor, list[int]], int]
PaddedLen = Callable[[list[int], int], int]
Strip = Callable[[torch.Tensor, list[int], int], torch.Tensor]
GatherIndex = Callable[[list[torch.Tensor], int], torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Accepts = Callable[[list[tuple[int, ...]], list[int], list[int], int], bool]
Bill = Callable[[int, int, int, int, int], Mapping[str, int]]


# ------------------------------------------------------------------------- 1 to 3: the layout


@LESSON.exercise("e1", "the owner of a token")
def check_owner(owner: Owner) -> Score:
    """Check every token of every length up to 40, over 1 to 5 ranks."""
    cases = 0
    for cp_size in range(1, 6):
        for length in range(2 * cp_size, 41):
            layout = prepare_context_parallel_metadata([length], cp_size)
            for token, wanted in enumerate(layout.owners().tolist()):
                got = owner(token, length, cp_size)
                if not guard.equals(got, wanted):
                    raise WrongAnswer(
                        f"owner(token={token}, length={length}, cp_size={cp_size}) is "
                        f"{reprlib.repr(got)}; with blocks of {list(layout.split_list)} tokens, "
                        f"token {token} belongs to rank {wanted}"
                    )
                cases += 1
    return Score(cases)


@LESSON.exercise("e2", "count the keys")
def check_keys_seen(keys_seen: KeysSeen) -> Score:
    """Check every rank of small and random batches; report how evenly the work is spread."""
    cases = 0
    for layout in rows.layouts():
        for rank in range(layout.cp_size):
            tokens, lengths = layout.rank_rows(rank), list(layout.lengths)
            starts = torch.tensor(layout.starts)[layout.sequence_of(tokens)]
            wanted = int((tokens - starts + 1).sum())
            got = keys_seen(tokens.clone(), list(lengths))
            if isinstance(got, torch.Tensor) or not guard.equals(got, wanted):
                raise WrongAnswer(
                    f"keys_seen(tokens={tokens.tolist()}, lengths={lengths}) is "
                    f"{reprlib.repr(got)}; each token attends to itself and the earlier tokens of "
                    f"its own sequence: {wanted} keys, as an int"
                )
            cases += 1
    ratios = (f"{strategy} {_imbalance(keys_seen, strategy):.2f}" for strategy in STRATEGIES)
    return Score(cases, note=f"largest / mean work, 4 ranks, 4096 tokens: {', '.join(ratios)}")


def _imbalance(keys_seen: KeysSeen, strategy: str) -> float:
    """Return the work of the slowest rank / the mean, for 4 ranks and 4096 tokens."""
    layout = prepare_context_parallel_metadata([4096], 4, strategy)
    work = [keys_seen(layout.rank_rows(rank), [4096]) for rank in range(4)]
    return max(work) / (sum(work) / len(work))


@LESSON.exercise("e3", "the padded length")
def check_padded_len(padded_len: PaddedLen) -> Score:
    """Check that the length is the smallest that fits the rows of every rank."""
    cases = slots = needed = 0
    for lengths, cp_size in _batches():
        held = prepare_context_parallel_metadata(lengths, cp_size).per_rank_actual_token
        got = padded_len(list(lengths), cp_size)
        if not isinstance(got, int) or got != max(held):
            raise WrongAnswer(_length_fault(got, lengths, cp_size, held))
        cases, slots, needed = cases + 1, slots + got * cp_size, needed + max(held) * cp_size
    return Score(cases, {"slots": (slots, needed)})


def _batches() -> Iterator[tuple[Sequence[int], int]]:
    for cp_size in range(1, 7):
        yield from (((length,), cp_size) for length in range(2 * cp_size, 4 * cp_size + 2))
    yield (4097,) * 16, 4
    draw = random.Random(3)
    for _ in range(300):
        cp_size = draw.randint(1, 8)
        count = draw.randint(1, 6)
        yield tuple(draw.randint(2 * cp_size, 60) for _ in range(count)), cp_size


def _length_fault(got: object, lengths: Sequence[int], cp_size: int, held: Sequence[int]) -> str:
    shown = f"[{lengths[0]}] * {len(lengths)}" if len(lengths) > 8 else str(list(lengths))
    call = f"padded_len({shown}, {cp_size}) is {got!r:.60}. The ranks hold {list(held)} rows"
    if not isinstance(got, int):
        return f"{call}. A length is an int"
    if got > max(held):
        return f"{call}, so {max(held)} slots per rank are enough"
    rank = held.index(max(held))
    return f"{call}, so {max(held) - got} row(s) of rank {rank} would be cut off"


# --------------------------------------------------------------- 4 and 5: strip and reorder


@LESSON.exercise("e4", "strip the padding")
def check_strip(strip: Strip) -> Score:
    """Check small and random layouts in two rounds each, with poisoned padding."""
    cases, yours, reference = 0, CopyCounter(), CopyCounter()
    for round_, layout in rows.rounds(rows.layouts()):
        wire = rows.wire_buffer(layout, round_)
        wanted = rows.token_order(layout, round_)[layout.rank_order]
        with yours:
            got = strip(wire, list(layout.per_rank_actual_token), layout.max_rank_len[0])
        with reference:
            _stripped(wire, layout)
        rows.check_rows("strip", got, wanted, layout)
        cases += 1
    costs = {
        "copies (each a kernel on a GPU)": (yours.kernels, reference.kernels),
        "bytes written": (yours.bytes_written, reference.bytes_written),
    }
    return Score(cases, costs)


@LESSON.exercise("e5", "one index for strip and reorder")
def check_gather_index(gather_index: GatherIndex) -> Score:
    """Check that `wire[index]` is token order, for small and random layouts in two rounds."""
    cases, yours, two_steps = 0, CopyCounter(), CopyCounter()
    for round_, layout in rows.rounds(rows.layouts()):
        wire = rows.wire_buffer(layout, round_)
        order = layout.token_order
        tokens = [layout.rank_rows(rank).clone() for rank in range(layout.cp_size)]
        index = _checked_index(gather_index(tokens, layout.max_rank_len[0]), layout, len(wire))
        with yours:
            got = wire[index]
        rows.check_rows("wire[gather_index]", got, rows.token_order(layout, round_), layout)
        with two_steps:
            _stripped(wire, layout)[order]
        cases += 1
    costs = {"bytes written": (yours.bytes_written, two_steps.bytes_written)}
    return Score(cases, costs, note="the reference strips first and then reorders")


def _stripped(wire: torch.Tensor, layout: ContextParallelMetadata) -> torch.Tensor:
    """Copy the rows of all ranks without their padding: rank order."""
    parts = zip(wire.split(layout.max_rank_len[0]), layout.per_rank_actual_token, strict=True)
    return torch.cat([part[:held] for part, held in parts])


def _checked_index(index: object, layout: ContextParallelMetadata, slots: int) -> torch.Tensor:
    where = describe_layout(layout)
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        raise WrongAnswer(f"{where}: an index is an int64 tensor [tokens]; got {index!r:.80}")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= slots):
        raise WrongAnswer(
            f"{where}: the index holds {int(index.min())} to {int(index.max())}; the buffer has "
            f"slots 0 to {slots - 1}"
        )
    return index


# -------------------------------------------------------------------- 6: attention needs order

TOLERANCE = 1e-12  # float64; the data have magnitude 1


@LESSON.exercise("e6", "context-parallel attention")
def check_cp_attention(cp_attention: Attention) -> Score:
    """Compare every rank's outputs with those of one device that computes the whole sequence."""
    cases = 0
    for strategy in ("zigzag", "interleave", "contiguous"):
        for length in (8, 13, 24):
            for cp_size in (1, 2, 4):
                layout = prepare_context_parallel_metadata([length], cp_size, strategy)
                torch.manual_seed(length)
                q, k, v = torch.randn(3, 2, length, 8, dtype=torch.float64)
                whole = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                for rank in range(cp_size):
                    tokens = layout.rank_rows(rank)
                    got = cp_attention(q[:, tokens], k.clone(), v.clone(), tokens.clone())
                    _check_output(got, whole[:, tokens], layout, rank)
                    cases += 1
    return Score(cases, note=f"largest error below {TOLERANCE:g}")


def _check_output(
    got: object, want: torch.Tensor, layout: ContextParallelMetadata, rank: int
) -> None:
    where = f"{layout.total_tokens} tokens, {layout.strategy}, rank {rank} of {layout.cp_size}"
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        shape = list(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise WrongAnswer(
            f"{where}: the output is {shape}; expected [heads, rows, dim] = {list(want.shape)}"
        )
    errors = torch.nan_to_num(got - want, nan=torch.inf).abs().amax((0, 2))
    wrong = (errors > TOLERANCE).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        token = int(layout.rank_rows(rank)[row])
        keys = f"keys 0 to {token}" if token else "key 0"
        raise WrongAnswer(
            f"{where}: row {row} is token {token}, which must attend to exactly {keys}; its "
            f"output is off by {float(errors[row]):.2f} ({len(wrong)} of {len(errors)} rows are "
            "wrong)"
        )


# ---------------------------------------------------- 7: a check that detects broken gathers

Rows = npt.NDArray[np.int64]  # [slots, 4]: round, rank, sequence, token


@LESSON.exercise("e7", "a check that rejects all mutants")
def check_accepts(accepts: Accepts) -> Score:
    """Check that right gathers are accepted and broken ones rejected, for random batches."""
    draw = random.Random(11)
    cases = rejected = 0
    for round_, layout in rows.rounds(_small_layout(draw) for _ in range(20)):
        for name, got in _gathers(layout, round_).items():
            owners, lengths = layout.owners().tolist(), list(layout.lengths)
            accepted = accepts([tuple(row) for row in got.tolist()], lengths, owners, round_)
            if guard.truth("accepts", accepted) != (name == "right"):
                where = f"(lengths {lengths}, cp_size {layout.cp_size}, round {round_})"
                if name == "right":
                    starts = ", ".join(map(str, layout.starts))
                    raise WrongAnswer(
                        f"your check rejects a correct gather {where}. Its sequences begin at "
                        f"slots {starts}"
                    )
                fault = _first_fault(got, layout, round_)
                raise WrongAnswer(f"your check accepts `{name}` {where}. {fault}")
            cases, rejected = cases + 1, rejected + (name != "right")
    return Score(cases, {"mutants killed": (rejected, rejected)})


def _small_layout(draw: random.Random) -> ContextParallelMetadata:
    cp_size = draw.randint(2, 4)
    lengths = [draw.randint(2 * cp_size, 20) for _ in range(draw.randint(1, 3))]
    return prepare_context_parallel_metadata(lengths, cp_size, "zigzag")


def _gathers(layout: ContextParallelMetadata, round_: int) -> dict[str, Rows]:
    """Return the decoded rows in token order after one right and ten broken gathers."""
    draw = random.Random(round_)
    right = decode_rows(rows.token_order(layout, round_)).numpy()
    owner = right[:, 1]
    one, other = draw.sample(range(layout.cp_size), 2)
    at = draw.randrange(len(right) - 1)
    names = (
        "two ranks exchanged",
        "rank order: reorder forgotten",
        "stale: one rank's previous round",
        "padding in place of a row",
        "a row twice",
        "two neighbours exchanged",
        "written by a rank that is not the owner",
        "the last row lost",
        "slots after the end",
        "wrong sequence number",
    )
    made = {name: right.copy() for name in ("right", *names)}
    made["two ranks exchanged"] = _exchanged(right, one, other)
    made["rank order: reorder forgotten"] = right[layout.rank_order.numpy()]
    made["stale: one rank's previous round"][owner == one, 0] = round_ - 1
    made["padding in place of a row"][at] = -1
    made["a row twice"][at + 1] = right[at]
    made["two neighbours exchanged"][[at, at + 1]] = right[[at + 1, at]]
    made["written by a rank that is not the owner"][owner == one, 1] = other
    made["the last row lost"] = right[:-1]
    made["slots after the end"] = np.concatenate([right, right[-1:], np.full_like(right[:1], -1)])
    last = int(right[:, 2].max())
    made["wrong sequence number"][right[:, 2] == last, 2] = last + 1
    return made


def _exchanged(right: Rows, one: int, other: int) -> Rows:
    """Swap the rows of two ranks, up to the number of rows that both hold."""
    got = right.copy()
    mine, theirs = np.flatnonzero(right[:, 1] == one), np.flatnonzero(right[:, 1] == other)
    count = min(len(mine), len(theirs))
    got[mine[:count]], got[theirs[:count]] = right[theirs[:count]], right[mine[:count]]
    return got


def _first_fault(got: Rows, layout: ContextParallelMetadata, round_: int) -> str:
    want = decode_rows(rows.token_order(layout, round_))
    for slot, row in enumerate(want):
        held = "nothing"
        if slot < len(got):
            held = rows.describe_row(torch.from_numpy(got[slot]))
        if held != rows.describe_row(row):
            return f"Slot {slot} holds {held}; expected {rows.describe_row(row)}"
    held = rows.describe_row(torch.from_numpy(got[len(want)]))
    return f"Slot {len(want)} is after the end of the batch and holds {held}"


_WEAK_CHECKS: Mapping[str, Callable[[Rows, Rows], bool]] = {
    "lengths only": lambda got, want: len(got) == len(want),
    "one constant per rank": lambda got, want: np.array_equal(got[:, 1], want[:, 1]),
    "the same set of tokens": lambda got, want: (
        set(map(tuple, got[:, 2:])) == set(map(tuple, want[:, 2:]))
    ),
    "tokens in order": lambda got, want: np.array_equal(got[:, 2:], want[:, 2:]),
}


def kill_table(layout: ContextParallelMetadata, round_: int) -> pd.DataFrame:
    """Apply the checks of real test suites to every broken gather: `✓ killed` or `alive`."""
    gathers = _gathers(layout, round_)
    want = gathers.pop("right")
    return pd.DataFrame(
        {
            check: ["alive" if accepts(got, want) else "✓ killed" for got in gathers.values()]
            for check, accepts in _WEAK_CHECKS.items()
        },
        index=pd.Index(list(gathers), name="broken gather"),
    )


# ---------------------------------------------------------------------- 8: bytes of each stage


@LESSON.exercise("e8", "the bytes of a padded gather")
def check_bill(bill: Bill) -> Score:
    """Compare with the bytes that torch writes when the four stages are executed."""
    cases, padded, direct = 0, 0, 0
    for lengths, cp_size in (([8], 2), ([13, 9], 4), ([9], 3), ([40, 17], 2), ([24], 1)):
        layout = prepare_context_parallel_metadata(lengths, cp_size)
        for rank in range(cp_size):
            measured = written_bytes(layout, rank)
            held = layout.per_rank_actual_token[rank]
            arguments = (held, layout.max_rank_len[0], layout.total_tokens, cp_size, ROW_BYTES)
            got = bill(*arguments)
            if not isinstance(got, Mapping) or set(got) != set(measured):
                raise WrongAnswer(
                    f"bill returned {reprlib.repr(got)}; expected a dict of {', '.join(measured)}"
                )
            for stage, wanted in measured.items():
                if not guard.equals(got[stage], wanted):
                    call = f"bill({', '.join(map(str, arguments))})"
                    raise WrongAnswer(
                        f"{call}[{stage!r}] is {reprlib.repr(got[stage])}; expected {wanted}, the "
                        f"bytes that torch writes for rank {rank} of {cp_size}, lengths {lengths}"
                    )
            cases, padded = cases + 1, padded + sum(measured.values())
            direct += layout.total_tokens * ROW_BYTES
    return Score(
        cases,
        note=f"in these cases, padded writes {padded / direct:.2f} times as many bytes as direct",
    )


def written_bytes(layout: ContextParallelMetadata, rank: int) -> dict[str, int]:
    """Run the four stages of the padded gather on one rank; return the bytes written by each."""
    longest, held = layout.max_rank_len[0], layout.per_rank_actual_token[rank]
    order = layout.token_order  # computed here, because it must not be counted
    wire = rows.wire_buffer(layout, 1)
    parts = list(wire.split(longest))
    with CopyCounter() as pad:
        if held < longest:
            parts[rank] = functional.pad(parts[rank][:held], (0, 0, 0, 0, 0, longest - held))
    with CopyCounter() as wired:
        gathered = torch.empty_like(wire)
        for slot, part in zip(gathered.split(longest), parts, strict=True):
            slot.copy_(part)
    with CopyCounter() as strip:
        stripped = _stripped(gathered, layout)
    with CopyCounter() as reorder:
        stripped[order]
    stages = {"pad": pad, "wire": wired, "strip": strip, "reorder": reorder}
    return {name: counter.bytes_written for name, counter in stages.items()}
