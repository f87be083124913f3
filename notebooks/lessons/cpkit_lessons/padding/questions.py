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
        f"Zigzag splits {6 * cp} tokens over {cp} ranks. Which rank owns token {token}?",
        answer=last - block,
        between=(0, cp - 1),
        wrong={
            token % cp: f"That is {token} mod {cp}, the rule of interleave. Zigzag cuts the "
            f"sequence into {2 * cp} blocks.",
            1: f"Token {token} is in block {block}, and {block} mod {cp} is 1. But zigzag reverses "
            f"at the last rank: blocks {cp} to {last} are assigned in descending order of ranks.",
            cp - 1: f"The last rank owns block {cp}, where the order reverses. Token {token} is in "
            f"block {block}.",
        },
        why=f"Blocks have 3 tokens, so token {token} is in block {block}, the mirror image of "
        f"block {last - block}.",
    )


@LESSON.asks
def work(world: World) -> Prediction:
    """Ask for the ratio of work of the last rank and the first, 6 tokens per rank."""
    cp = world.cp_size
    first, last = 21, 6 * 6 * cp - 15  # 1 + … + 6, and the last six of 1 … 6·cp
    return Prediction(
        f"The contiguous strategy splits {6 * cp} tokens over {cp} ranks. For each rank, add up "
        f"the keys that its tokens attend to. What is the ratio of the sum of rank {cp - 1} to "
        "that of rank 0?",
        answer=last / first,
        unit="times",
        tolerance=0.08,
        wrong={
            1: "Both ranks hold 6 tokens. But token t attends to t + 1 keys, so late tokens cost "
            "more.",
            cp: f"The last token of rank {cp - 1} attends to {cp} times as many keys as the last "
            "token of rank 0. For earlier tokens the ratio is larger.",
            2 * cp - 1: f"{2 * cp - 1} is the ratio for very long sequences. For short sequences "
            "it is smaller.",
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
        f"Zigzag spreads two sequences of {first} and {second} tokens over {cp} ranks. What "
        "fraction of the gathered slots is padding?",
        answer=(slots - total) / slots,
        unit="of all slots",
        between=(0, 1),
        tolerance=0.05,
        wrong={
            0: f"Zigzag does not spread {total} tokens evenly over {cp} ranks: some hold fewer "
            "rows than others.",
            (slots - total) / total: f"That is padding / tokens. The question asks for "
            f"padding / slots, and {cp} ranks send {longest} slots each.",
        },
        why=f"Every rank pads its shard to the longest one, {longest} rows: {cp} · {longest} = "
        f"{slots} slots for {total} tokens.",
    )


@LESSON.asks
def cut(world: World) -> Prediction:
    """Ask how many rows the formula ceil(total / cp) cuts off."""
    cp = world.cp_size
    rows = prepare_context_parallel_metadata([4097] * 16, cp).per_rank_actual_token
    formula = -(-16 * 4097 // cp)
    return Prediction(
        f"Zigzag spreads 16 sequences of 4097 tokens over {cp} ranks. If every shard has room for "
        "ceil(total / cp) rows, how many rows of rank 0 are cut off?",
        answer=16 - 16 // cp,
        unit="rows",
        tolerance=0.01,
        wrong={
            0: "That is right for one sequence. Here each of the 16 sequences adds its extra "
            "token to rank 0.",
            16: f"Rank 0 does hold 16 tokens more than the others. But the formula has room for "
            f"{16 // cp} of them on every rank.",
            16 // cp: f"The other ranks hold {rows[1]} rows, and the formula has room for "
            f"{16 // cp} more. Rank 0 needs room for 16 more.",
        },
        why="Each sequence has one extra token, and zigzag adds it to the first block: rank 0 "
        f"holds {rows[0]} rows, every other rank {rows[1]}. The formula gives {formula}. SGLang "
        "used this formula up to 0.5.12, which was correct because only one sequence was allowed; "
        "since 0.5.13 it takes the maximum over ranks.",
    )


LESSON.ask(
    "passes",
    "Suppose that a rank has to pad its shard in the `padded` algorithm. How many times is each "
    "of its rows written before another rank's attention reads it?",
    answer=4,
    unit="times",
    tolerance=0.01,
    wrong={
        1: "That counts only the exchange between the ranks. Count the copies before and after it "
        "too.",
        2: "Count the copies after the exchange again: strip and reorder are two. Before the "
        "exchange, the pad copies the row as well.",
        3: "That is right for a rank that holds the most rows, because it does not pad. The others "
        "copy their rows once more.",
    },
    why="Pad, wire (the exchange), strip and reorder each write every row of this shard once. On "
    "two H100s, SGLang's pipeline took 1067 µs for 268 MB, and NCCL's all-gather alone 556 µs. So "
    "pad, strip and reorder cost 511 µs (benchmarks/results/2026-11-28-gpu.json, commit "
    "6b142c512aef).",
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
        "After the wire, in which slot of the large buffer is token 0 of sequence 1?",
        answer=first_block,
        between=(0, sum(layout.max_rank_len) - 1),
        tolerance=0.01,
        wrong={
            lengths[0]: "That is its position in token order. After the wire, the buffer holds "
            "the padded shard of rank 0, then that of rank 1, and so on.",
            layout.max_rank_len[0]: f"Slot {layout.max_rank_len[0]} is the first slot of rank 1. "
            "Token 0 of a sequence is in block 0, on rank 0.",
            of_first: f"Rank 0 holds {of_first} rows of sequence 0. But its second block of "
            "sequence 0 comes after the first block of sequence 1.",
        },
        why="Rank 0 stores its first block of every sequence, then its second block of every one. "
        f"Its first block of sequence 0 has {first_block} tokens; then sequence 1 begins.",
    )


@LESSON.asks
def order(world: World) -> Prediction:
    """Ask how many outputs of causal attention over rank order are right, 3 tokens per block."""
    tokens = 6 * world.cp_size
    return Prediction(
        f"Causal attention over {tokens} tokens reads K and V in rank order. How many of the "
        f"{tokens} outputs are right?",
        answer=4,
        unit=f"of {tokens} outputs",
        between=(0, tokens),
        tolerance=0.01,
        wrong={
            tokens: "That is true without a mask, because a sum does not depend on order. A causal "
            "mask depends on it.",
            0: "Rank order also begins with tokens 0, 1, 2, so the first outputs use the right "
            "keys.",
            3: "The first three are right. But one more token attends to all keys, so their order "
            "does not matter.",
            1: "The last token attends to all keys, so it is right. But the first three also use "
            "the right keys.",
        },
        why="Output t is right if the first t + 1 rows of rank order are the tokens 0 … t. That "
        f"holds for 0, 1 and 2, which rank 0 holds first, and for {tokens - 1}, which attends to "
        "all keys.",
    )


LESSON.ask(
    "survivors",
    "How many of the 10 broken gathers pass a check that only counts the slots?",
    answer=8,
    unit="of 10",
    between=(0, 10),
    tolerance=0.01,
    wrong={
        0: "Most of the faults move or change rows, which does not change their number.",
        4: "More gathers pass: only a fault that loses or adds a slot changes the count.",
        9: "One of the ten loses a row, and one has slots after the end. The check detects both.",
        10: "One of the ten loses a row, and one has slots after the end. The check detects both.",
    },
    why="A count does not check positions. vLLM's reorg_kvcache asserts lengths only, so it would "
    "not detect that the blocks of two ranks are exchanged.",
)


@LESSON.asks
def bill(world: World) -> Prediction:
    """Ask for the bytes that padded writes, in units of those that direct writes."""
    cp = world.cp_size
    return Prediction(
        f"One prompt of 32767 tokens is spread over {cp} ranks. On a rank that pads, what is the "
        "ratio of the bytes that `padded` writes to those that `direct` writes?",
        answer=3 + 1 / cp,
        unit="times",
        tolerance=0.02,
        wrong={
            4: f"The pad copies only the rank's own shard: 1/{cp} of the rows, not all.",
            3: f"That is right for a rank that does not pad. The pad copies the shard once more, "
            f"which is 1/{cp} of the rows.",
            1: "Both gather the same rows, but padded writes every row three times or more.",
        },
        why=f"If one copy of all rows counts as 1, the pad writes 1/{cp}, and wire, strip and "
        "reorder write 1 each. direct writes each row once, at its final position.",
    )


LESSON.ask(
    "plan",
    "all_gather_kv synchronizes twice per call. How many times does a call of a plan synchronize?",
    answer=1,
    between=(0, 2),
    tolerance=0.01,
    wrong={
        0: "Without any synchronization, a rank could not detect that its peers' rows are there.",
        2: "The first of the two is the agreement, and the ranks already agreed when they made "
        "the plan.",
    },
    why="Only the barrier after the stores remains. The agreement happens once, when the plan is "
    "made.",
)
