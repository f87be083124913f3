"""Notebook 1: its predictions, and what each typical wrong answer overlooks."""

from __future__ import annotations

from cpkit_lessons.lesson import Lesson

LESSON = Lesson("01_padding_and_reorg")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress

LESSON.ask(
    "owner",
    "24 tokens, 4 ranks, zigzag: which rank owns token 17?",
    answer=2,
    wrong={
        5: "5 is its block. Blocks 4 to 7 are assigned in reverse: block 5 belongs to rank 7 − 5.",
        1: "17 mod 4 and block 5 mod 4 are both 1, but zigzag reverses at the last rank.",
        3: "17 · 4 / 24 assumes one contiguous block per rank. Zigzag has two blocks per rank.",
    },
    why="Blocks have 3 tokens, so token 17 is in block 5, the mirror of block 2.",
)
LESSON.ask(
    "work",
    "Contiguous, 24 tokens, 4 ranks: how many times as many keys as rank 0 does rank 3 attend to?",
    answer=129 / 21,
    unit="times",
    wrong={
        1: "Both hold 6 tokens. But token t attends to t + 1 keys, so late tokens cost more.",
        4: "The last token of rank 3 attends to 4 times as many keys; for earlier ones it is more.",
        7: "7 is the ratio for very long sequences. For short ones it is smaller.",
    },
    why="Rank 0 attends to 1 + … + 6 = 21 keys, rank 3 to 19 + … + 24 = 129.",
    tolerance=0.08,
)
LESSON.ask(
    "waste",
    "13 and 9 tokens over 4 ranks, zigzag: what fraction of the gathered slots (0 to 1) is "
    "padding?",
    answer=2 / 24,
    unit="of all slots",
    tolerance=0.05,
    wrong={
        0: "22 tokens over 4 ranks do not divide evenly: some ranks hold one row less.",
        2 / 22: "That is padding / tokens. The ranks send slots: 4 ranks of 6 rows.",
    },
    why="Every rank pads to the longest, 6 rows: 4 · 6 = 24 slots for 22 tokens.",
)
LESSON.ask(
    "cut",
    "16 sequences of 4097 tokens, 4 ranks: how many rows of rank 0 does ceil(total / cp) cut off?",
    answer=12,
    unit="rows",
    tolerance=0.01,
    wrong={
        0: "Right for one sequence. Here each of 16 sequences adds its odd token to rank 0.",
        16: "Rank 0 does hold 16 tokens more. But the formula adds 4 of them to every rank.",
        4: "4 is what the formula adds to 16384 rows. Rank 0 needs 16.",
    },
    why="Each sequence has one odd token, and zigzag adds it to the first block: rank 0 holds "
    "16400 rows, the others 16384. The formula gives 16388. SGLang up to 0.5.12 used it, and "
    "allowed only one sequence; from 0.5.13 on it takes the maximum over ranks.",
)
LESSON.ask(
    "slot",
    "After the wire: in which slot of the big buffer is token 0 of sequence 1?",
    answer=2,
    tolerance=0.01,
    wrong={
        13: "That is its position in token order. After the wire, rows are in rank order, padded.",
        6: "Slot 6 is the first slot of rank 1. Token 0 of a sequence is in block 0, on rank 0.",
        3: "Block 0 of sequence 0 has 2 tokens: 13 tokens in 8 blocks are 5 of 2 and 3 of 1.",
    },
    why="Rank 0 holds all its first blocks, sequence by sequence, then all its second blocks: 2 "
    "tokens of sequence 0, then sequence 1 begins.",
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
    "268 MB took 512 µs, and the collective between them 554 µs "
    "(benchmarks/results/2026-11-26-gpu.json, commit 9e08251af0f6).",
)
LESSON.ask(
    "order",
    "Causal attention over 24 tokens reads K and V in rank order: how many outputs are right?",
    answer=4,
    unit="of 24 outputs",
    tolerance=0.01,
    wrong={
        24: "True without a mask, because a sum does not depend on order. The causal mask does.",
        0: "Rank order begins with 0, 1, 2 too, so the first outputs use the right keys.",
        3: "Right for the first three. But one token attends to all keys, in any order.",
        1: "The last token attends to all keys. But the first three also use the right ones.",
    },
    why="Output t is right if the first t + 1 rows of rank order are the tokens 0 … t. That holds "
    "for 0, 1 and 2, which rank 0 holds first, and for 23, which attends to all keys.",
)
LESSON.ask(
    "survivors",
    "10 broken gathers: how many pass a check of the number of rows?",
    answer=8,
    unit="of 10",
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
LESSON.ask(
    "bill",
    "32767 tokens, 4 ranks: a rank that pads writes how many times the bytes of direct?",
    answer=3.25,
    unit="times",
    tolerance=0.02,
    wrong={
        4: "The pad copies only the rank's own shard: a quarter of the rows, not all.",
        3: "Right for a rank that does not pad. The pad copies the shard once more, a quarter.",
        1: "Both move the same rows, but padded writes most of them three times.",
    },
    why="Pad 1/4, wire 1, strip 1, reorder 1; direct writes each row once, at its final position.",
)
