"""Notebook 1, exercises 4, 5 and 8: strip the padding, compose it with the reorder, count bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit_lessons import rows
from cpkit_lessons.copy_counter import CopyCounter
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.padding_questions import LESSON

Strip = Callable[[torch.Tensor, list[int], int], torch.Tensor]
GatherIndex = Callable[[list[torch.Tensor], int], torch.Tensor]
ROW_BYTES = torch.empty(rows.ROW_SHAPE, dtype=rows.DTYPE).nbytes
Bill = Callable[[int, int, int, int, int], Mapping[str, int]]


@LESSON.exercise("e4", "strip the padding")
def check_strip(strip: Strip) -> Score:
    """Small and random layouts, two rounds each, padding poisoned."""
    cases, mine, reference = 0, CopyCounter(), CopyCounter()
    for round_, layout in rows.rounds(rows.layouts()):
        held, longest = layout.per_rank_actual_token, layout.max_rank_len[0]
        wire = rows.wire_buffer(layout, round_)
        wanted = rows.token_order(layout, round_)[layout.rank_order]
        with mine:
            got = strip(wire, list(held), longest)
        with reference:
            torch.cat([part[:n] for part, n in zip(wire.split(longest), held, strict=True)])
        rows.must_equal("strip", got, wanted, layout)
        cases += 1
    return Score(
        cases,
        {
            "kernels": (mine.kernels, reference.kernels),
            "bytes written": (mine.bytes_written, reference.bytes_written),
        },
    )


@LESSON.exercise("e5", "one index for strip and reorder")
def check_gather_index(gather_index: GatherIndex) -> Score:
    """`wire[index]` is token order, for small and random layouts in two rounds."""
    cases, mine, two_steps = 0, CopyCounter(), CopyCounter()
    for round_, layout in rows.rounds(rows.layouts()):
        wire, longest = rows.wire_buffer(layout, round_), layout.max_rank_len[0]
        order = layout.token_order
        held = [layout.rank_rows(rank) for rank in range(layout.cp_size)]
        index = _checked_index(gather_index([r.clone() for r in held], longest), layout, len(wire))
        with mine:
            got = wire[index]
        rows.must_equal("wire[gather_index]", got, rows.token_order(layout, round_), layout)
        with two_steps:
            parts = zip(wire.split(longest), layout.per_rank_actual_token, strict=True)
            torch.cat([part[:n] for part, n in parts])[order]
        cases += 1
    cost = {"bytes written": (mine.bytes_written, two_steps.bytes_written)}
    return Score(cases, cost, note="the reference strips first and then reorders")


@LESSON.exercise("e8", "the bill of a padded gather")
def check_bill(bill: Bill) -> Score:
    """Compared with what torch writes when the four stages are really run."""
    cases, padded, direct = 0, 0, 0
    for lengths, cp_size in (([8], 2), ([13, 9], 4), ([9], 3), ([40, 17], 2), ([24], 1)):
        layout = prepare_context_parallel_metadata(lengths, cp_size)
        for rank in range(cp_size):
            measured = written_bytes(layout, rank)
            held = layout.per_rank_actual_token[rank]
            arguments = (held, layout.max_rank_len[0], layout.total_tokens, cp_size, ROW_BYTES)
            got = bill(*arguments)
            for stage, wanted in measured.items():
                if not isinstance(got, Mapping) or got.get(stage) != wanted:
                    names = "rows, max_rank_len, total, cp_size, row_bytes"
                    found = got.get(stage, "missing") if isinstance(got, Mapping) else got
                    raise Wrong(
                        f"bill({names} = {', '.join(map(str, arguments))}): {stage} is {found}; "
                        f"torch wrote {wanted} bytes on rank {rank} of {cp_size}, lengths {lengths}"
                    )
            cases, padded = cases + 1, padded + sum(measured.values())
            direct += layout.total_tokens * ROW_BYTES
    return Score(cases, note=f"padded writes {padded / direct:.2f} times what direct writes")


def written_bytes(layout: ContextParallelMetadata, rank: int) -> dict[str, int]:
    """Run the four stages of the padded gather for one rank; bytes that torch writes in each."""
    longest, held = layout.max_rank_len[0], layout.per_rank_actual_token
    order = layout.token_order  # made before anything is counted
    wire = rows.wire_buffer(layout, 1)
    shard = wire[rank * longest :][: held[rank]]
    with CopyCounter() as pad:
        missing = longest - held[rank]
        full = functional.pad(shard, (0, 0, 0, 0, 0, missing)) if missing else shard
    with CopyCounter() as wired:
        parts = [
            full if r == rank else wire[r * longest :][:longest] for r in range(layout.cp_size)
        ]
        gathered = torch.empty_like(wire)
        for place, part in zip(gathered.split(longest), parts, strict=True):
            place.copy_(part)
    with CopyCounter() as strip:
        cut = zip(gathered.split(longest), held, strict=True)
        stripped = torch.cat([part[:n] for part, n in cut])
    with CopyCounter() as reorder:
        stripped[order]
    stages = {"pad": pad, "wire": wired, "strip": strip, "reorder": reorder}
    return {name: counted.bytes_written for name, counted in stages.items()}


def _checked_index(index: object, layout: ContextParallelMetadata, slots: int) -> torch.Tensor:
    where = f"cp_size {layout.cp_size}, {layout.strategy}, lengths {list(layout.lengths)}"
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        raise Wrong(f"{where}: an index is an int64 tensor [tokens]; got {index!r:.80}")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= slots):
        raise Wrong(
            f"{where}: the index holds {int(index.min())} to {int(index.max())}; the buffer has "
            f"slots 0 to {slots - 1}"
        )
    return index
