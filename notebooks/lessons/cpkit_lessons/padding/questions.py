"""Notebook 1: its predictions, and what each typical wrong answer overlooks."""

from __future__ import annotations

from cpkit.layout import prepare_context_parallel_metadata
from cpkit_lessons.lesson import Lesson
from cpkit_lessons.prediction import Prediction
from cpkit_lessons.rows import ragged
from cpkit_lessons.world import World

LESSON = Lesson("01_padding_and_reorg")
begin, explain_missing_names = LESSON.begin, LESSON.explain_missing_names
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress


@LESSON.asks
def owner(world: World) -> Prediction:
    """Ask for the owner of the last token of block cp + 1, where every block has 3 tokens."""
    cp = world.cp_size
    token, last, block = 3 * cp + 5, 2 * cp - 1, cp + 1
    return Prediction(
        f"{6 * cp} tokens, {cp} ranks, zigzag: which rank owns token {token}?",
        answer=last - block,
        wrong={
            token % cp: f"That is {token} mod {cp}: interleave. Zigzag cuts into {2 * cp} blocks.",
            1: f"Block {block} mod {cp} is 1, but zigzag reverses at the last rank.",
            block: f"{block} is its block. Blocks {cp} to {last} are assigned in reverse: block "
            f"{block} belongs to rank {last} − {block}.",
            cp - 1: "Blocks are assigned in reverse from the last rank on, and the last rank has "
            f"block {cp}. Token {token} is in block {block}.",
        },
        why=f"Blocks have 3 tokens, so token {token} is in block {block}, the mirror of block "
        f"{last - block}.",
    )


@LESSON.asks
def work(world: World) -> Prediction:
    """Ask for the ratio of work of the last rank and the first, 6 tokens per rank."""
    cp = world.cp_size
    first, last = 21, 6 * 6 * cp - 15  # 1 + … + 6, and the last six of 1 … 6·cp
    return Prediction(
        f"Contiguous, {6 * cp} tokens, {cp} ranks: how many times as many keys as rank 0 does rank "
        f"{cp - 1} attend to?",
        answer=last / first,
        unit="times",
        tolerance=0.08,
        wrong={
            1: "Both hold 6 tokens. But token t attends to t + 1 keys, so late tokens cost more.",
            cp: f"The last token of rank {cp - 1} attends to {cp} times as many keys as that of "
            "rank 0; for earlier ones it is more.",
            2 * cp - 1: f"{2 * cp - 1} is the ratio for very long sequences. For short ones it is "
            "smaller.",
        },
        why=f"Rank 0 attends to 1 + … + 6 = {first} keys, rank {cp - 1} to {6 * cp - 5} + … + "
        f"{6 * cp} = {last}.",
    )


@LESSON.asks
def waste(world: World) -> Prediction:
    """Ask for the fraction of padding of two sequences."""
    cp, (first, second) = world.cp_size, ragged(world.cp_size)
    layout = prepare_context_parallel_metadata([first, second], cp)
    total, longest, slots = first + second, layout.max_rank_len[0], sum(layout.max_rank_len)
    return Prediction(
        f"{first} and {second} tokens over {cp} ranks, zigzag: what fraction of the gathered slots "
        "(0 to 1) is padding?",
        answer=(slots - total) / slots,
        unit="of all slots",
        between=(0, 1),
        tolerance=0.05,
        wrong={
            0: f"Zigzag does not spread {total} tokens evenly over {cp} ranks: some hold fewer "
            "rows than others.",
            (slots - total) / total: f"That is padding / tokens. The ranks send slots: {cp} ranks "
            f"of {longest} rows.",
        },
        why=f"Every rank pads to the longest, {longest} rows: {cp} · {longest} = {slots} slots for "
        f"{total} tokens.",
    )


@LESSON.asks
def cut(world: World) -> Prediction:
    """Ask how many rows the formula ceil(total / cp) cuts off."""
    cp = world.cp_size
    rows = prepare_context_parallel_metadata([4097] * 16, cp).per_rank_actual_token
    formula = -(-16 * 4097 // cp)
    return Prediction(
        f"16 sequences of 4097 tokens, {cp} ranks: how many rows of rank 0 does ceil(total / cp) "
        "cut off?",
        answer=16 - 16 // cp,
        unit="rows",
        tolerance=0.01,
        wrong={
            0: "Right for one sequence. Here each of 16 sequences adds its odd token to rank 0.",
            16: f"Rank 0 does hold 16 tokens more. But the formula adds {16 // cp} of them to "
            "every rank.",
            16 // cp: f"{16 // cp} is what the formula adds to {rows[1]} rows. Rank 0 needs 16.",
        },
        why=f"Each sequence has one odd token, and zigzag adds it to the first block: rank 0 holds "
        f"{rows[0]} rows, the others {rows[1]}. The formula gives {formula}. SGLang up to 0.5.12 "
        "used it, and allowed only one sequence; from 0.5.13 on it takes the maximum over ranks.",
    )


@LESSON.asks
def slot(world: World) -> Prediction:
    """Ask for the place of a token in the big buffer."""
    cp, lengths = world.cp_size, ragged(world.cp_size)
    layout = prepare_context_parallel_metadata(lengths, cp)
    held = layout.rank_rows(0).tolist()
    first_block = held.index(lengths[0])  # rows of sequence 0 before sequence 1 begins
    of_first = sum(token < lengths[0] for token in held)
    return Prediction(
        "After the wire: in which slot of the big buffer is token 0 of sequence 1?",
        answer=first_block,
        tolerance=0.01,
        wrong={
            lengths[0]: "That is its position in token order. After the wire, rows are in rank "
            "order, padded.",
            layout.max_rank_len[0]: f"Slot {layout.max_rank_len[0]} is the first slot of rank 1. "
            "Token 0 of a sequence is in block 0, on rank 0.",
            of_first: f"Rank 0 holds {of_first} rows of sequence 0. But its second block of "
            "sequence 0 comes after the first block of sequence 1.",
        },
        why="Rank 0 holds all its first blocks, sequence by sequence, then all its second blocks: "
        f"{first_block} tokens of sequence 0, then sequence 1 begins.",
    )


LESSON.ask(
    "passes",
    "padded: how many times is a row of a rank that pads written before the attention of another "
    "rank may read it?",
    answer=4,
    unit="times",
    tolerance=0.01,
    wrong={
        1: "That is the wire alone. Count the copies before and after it.",
        2: "Strip and reorder are two copies, not one, and the pad copied it before the wire.",
        3: "Right for a rank that holds the most rows: it pads nothing. The others pad first.",
    },
    why="Pad, wire, strip and reorder each write it once. On two H100s, pad, strip and reorder of "
    "268 MB took 487 µs, and the collective between them 554 µs "
    "(benchmarks/results/2026-11-26-gpu.json, commit 9d290d7bab56).",
)


@LESSON.asks
def order(world: World) -> Prediction:
    """Ask how many outputs of causal attention over rank order are right, 3 tokens per block."""
    tokens = 6 * world.cp_size
    return Prediction(
        f"Causal attention over {tokens} tokens reads K and V in rank order: how many outputs are "
        "right?",
        answer=4,
        unit=f"of {tokens} outputs",
        between=(0, tokens),
        tolerance=0.01,
        wrong={
            tokens: "True without a mask, because a sum does not depend on order. The causal mask "
            "does.",
            0: "Rank order begins with 0, 1, 2 too, so the first outputs use the right keys.",
            3: "Right for the first three. But one token attends to all keys, in any order.",
            1: "The last token attends to all keys. But the first three also use the right ones.",
        },
        why="Output t is right if the first t + 1 rows of rank order are the tokens 0 … t. That "
        f"holds for 0, 1 and 2, which rank 0 holds first, and for {tokens - 1}, which attends to "
        "all keys.",
    )


LESSON.ask(
    "survivors",
    "10 broken gathers: how many pass a check of the number of rows?",
    answer=8,
    unit="of 10",
    between=(0, 10),
    tolerance=0.01,
    wrong={
        0: "Most faults move rows. The number of rows does not depend on their positions.",
        4: "More: only a fault that loses or adds a row changes a length.",
        9: "One of the ten loses a row, and one has slots after the end. The check detects both.",
        10: "One of the ten loses a row, and one has slots after the end. The check detects both.",
    },
    why="A count does not check positions. vLLM's reorg_kvcache asserts lengths only: with the "
    "blocks of two ranks exchanged it would still pass.",
)


@LESSON.asks
def bill(world: World) -> Prediction:
    """Ask for the bytes that padded writes, in units of those that direct writes."""
    cp = world.cp_size
    return Prediction(
        f"32767 tokens, {cp} ranks: a rank that pads writes how many times the bytes of direct?",
        answer=3 + 1 / cp,
        unit="times",
        tolerance=0.02,
        wrong={
            4: f"The pad copies only the rank's own shard: 1/{cp} of the rows, not all.",
            3: f"Right for a rank that does not pad. The pad copies the shard once more, 1/{cp}.",
            1: "Both move the same rows, but padded writes most of them three times.",
        },
        why=f"Pad 1/{cp}, wire 1, strip 1, reorder 1; direct writes each row once, at its final "
        "position.",
    )
