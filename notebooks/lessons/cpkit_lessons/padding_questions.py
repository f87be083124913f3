"""Notebook 1: what is asked before it is run, and what the typical wrong answers overlook."""

from __future__ import annotations

from cpkit_lessons.lesson import Lesson

LESSON = Lesson("01_padding_and_reorg")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress

LESSON.ask(
    "owner",
    "24 tokens, 4 ranks, zigzag: which rank owns token 17?",
    answer=2,
    wrong={
        5: "5 is its block. Blocks 4 to 7 go back down the ranks: block 5 belongs to 7 − 5.",
        1: "17 mod 4 and block 5 mod 4 are both 1, but zigzag turns round at the last rank.",
        3: "17 · 4 / 24 is one contiguous block a rank. Zigzag cuts twice as fine.",
    },
    why="Blocks have 3 tokens, so token 17 is in block 5, the mirror of block 2.",
)
LESSON.ask(
    "work",
    "Contiguous, 24 tokens, 4 ranks: how many times as many keys as rank 0 does rank 3 look at?",
    answer=129 / 21,
    unit="times",
    wrong={
        1: "Both hold 6 tokens. But token t looks at t + 1 keys: late tokens cost more.",
        4: "Rank 3 is 4 times as far to the right only at its last token; look at the first ones.",
        7: "That is the ratio for very long sequences, 7 to 1. Short ones are milder.",
    },
    why="Rank 0 looks at 1 + … + 6 = 21 keys, rank 3 at 19 + … + 24 = 129.",
    close=0.08,
)
LESSON.ask(
    "waste",
    "13 and 9 tokens over 4 ranks, zigzag: which share (0 to 1) of the gathered slots is padding?",
    answer=2 / 24,
    unit="of all slots",
    close=0.05,
    wrong={
        0: "22 tokens over 4 ranks do not divide evenly: somebody has a row less.",
        2 / 22: "That is padding by tokens. What is sent are slots: 4 ranks of 6 rows.",
    },
    why="Every rank pads to the longest, 6 rows: 4 · 6 = 24 slots for 22 tokens.",
)
LESSON.ask(
    "cut",
    "16 sequences of 4097 tokens, 4 ranks: how many rows of rank 0 does ceil(total / cp) cut off?",
    answer=12,
    unit="rows",
    close=0.01,
    wrong={
        0: "Right for one sequence. Here 16 sequences each give their odd token to rank 0.",
        16: "Rank 0 does get 16 tokens more. But the formula spreads those over 4 ranks: 4 each.",
        4: "Those 4 are what the formula leaves room for. Rank 0 needs 16.",
    },
    why="Each sequence has one token too many, and zigzag makes its first block longer: rank 0 "
    "holds 16400 rows, the others 16384. The formula gives 16388. SGLang up to 0.5.12 used it, and "
    "let in one sequence only; 0.5.18 takes the maximum over ranks.",
)
LESSON.ask(
    "slot",
    "After the wire: in which slot of the big buffer is token 0 of sequence 1?",
    answer=2,
    close=0.01,
    wrong={
        13: "That is its place in token order. The wire brings rank order, with padding in it.",
        6: "Rank 1's buffer begins at slot 6. Token 0 of a sequence is in block 0: it is rank 0's.",
        3: "Rank 0's blocks of sequence 0 come as 2 tokens first, then the others: count again.",
    },
    why="Rank 0 holds all its first blocks, sequence by sequence, then all its second blocks: 2 "
    "tokens of sequence 0, then sequence 1 begins.",
)
LESSON.ask(
    "passes",
    "padded: how many times is a row written until the attention of another rank may read it?",
    answer=4,
    unit="times",
    close=0.01,
    wrong={
        1: "That is the wire alone. What happens to the row before and after?",
        2: "Strip and reorder are two copies, not one, and the pad copied it before the wire.",
        3: "One of pad, wire, strip and reorder is missing in your count.",
    },
    why="Pad, wire, strip, reorder: each writes it once. SGLang 0.5.23 makes four copies after the "
    "wire (trim, reverse, contiguous, scatter): by arithmetic as dear as the wire on 4 H200.",
)
LESSON.ask(
    "order",
    "Causal attention over 24 tokens reads K and V in rank order: how many outputs stay right?",
    answer=4,
    unit="of 24 outputs",
    close=0.01,
    wrong={
        24: "True without a mask: a sum does not care about order. The causal mask does.",
        0: "Rank order begins 0, 1, 2 too, so the first outputs see the right keys.",
        3: "Right for the first three. Which token sees all keys, in whatever order?",
        1: "The last token sees all keys. But the first three also see the right ones.",
    },
    why="Output t is right if the first t + 1 rows of rank order are the tokens 0 … t. That holds "
    "for 0, 1 and 2, which rank 0 holds first, and for 23, which sees everything.",
)
LESSON.ask(
    "survivors",
    "8 broken gathers: how many does a check of the number of rows let pass?",
    answer=7,
    unit="of 8",
    close=0.01,
    wrong={
        0: "Most faults move rows around. Counting does not see places.",
        4: "More: only a fault that loses or adds a row changes a length.",
        8: "One of the eight loses a row, and that is seen.",
    },
    why="Counting is not placing. vLLM's reorg_kvcache asserts lengths only: with the blocks of "
    "two ranks exchanged it would still pass.",
)
LESSON.ask(
    "bill",
    "32767 tokens, 4 ranks: how many times the bytes of direct does a rank that pads write?",
    answer=3.25,
    unit="times",
    close=0.02,
    wrong={
        4: "The pad copies only the rank's own shard: a quarter of the rows, not all.",
        3: "Right for a rank that does not pad. The pad copies the shard once more, a quarter.",
        1: "Both move the same rows, but padded writes most of them three times.",
    },
    why="Pad 1/4, wire 1, strip 1, reorder 1; direct writes each row once, at its final place.",
)
