"""Notebook 3: its predictions, and what each typical wrong answer overlooks."""

from __future__ import annotations

from cpkit_lessons.lesson import Lesson

LESSON = Lesson("03_allgather_perf")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress

LESSON.ask(
    "busbw",
    "4 ranks hold 8.4 MB each, and the gather takes 20 ms: what is busbw in GB/s?",
    answer=1.26,
    unit="GB/s",
    tolerance=0.02,
    wrong={
        1.68: "That is algbw, S / t. Each rank already holds a quarter of S: it crosses no link.",
        0.42: "That is one rank's 8.4 MB / t. S is the whole result: 33.6 MB.",
        0.315: "The factor is right. But S is the whole result, 4 · 8.4 MB, not one rank's 8.4 MB.",
        2.24: "The factor is (n−1)/n, not its inverse: less crosses the links than is gathered.",
        1.17: "You divided by 2³⁰. In nccl-tests a GB is 10⁹ bytes.",
    },
    why="S = 33.6 MB, algbw = S / t = 1.68 GB/s, busbw = 1.68 · 3/4. The documentation of "
    "nccl-tests once described one formula while its code computed the other (nccl-tests#45).",
)
LESSON.ask(
    "late",
    "Rank r arrives r · 5 ms late, and there is no barrier before the clock starts: what time in "
    "ms does the slowest rank report for a small gather?",
    answer=16.0,
    unit="ms",
    tolerance=0.5,
    wrong={
        0.5: "That is about the gather alone. But rank 0 waits for others while its clock runs.",
        5.0: "That is one step. Rank 0 waits for the last rank, which is three steps late.",
        30.0: "Rank 0 waits for the latest rank; the delays of the ranks do not add up.",
    },
    why="Rank 0 waits 3 · 5 ms while its clock runs. The gather is not slow: the measured time "
    "contains the delay of earlier work. A barrier before the clock removes it.",
)
LESSON.ask(
    "damage",
    "Three mistakes: what is their order by reported time / right time, the smallest first?",
    choices=("no barrier", "fastest rank", "not waited for"),
    answer=("not waited for", "fastest rank", "no barrier"),
    wrong={
        ("fastest rank", "not waited for", "no barrier"): "The fastest rank still moved its bytes. "
        "A call that is not waited for has moved nothing yet.",
        ("no barrier", "fastest rank", "not waited for"): "Without a barrier the early ranks wait "
        "while their clocks run, so the time grows.",
    },
    why="A call that is not waited for costs only its launch. The fastest rank leaves before the "
    "others are done. Without a barrier the work before the gather is counted too.",
)
LESSON.ask(
    "ranking",
    "64 MiB over 4 ranks: what is the order of the algorithms, the fastest first?",
    choices=("padded", "padded_symm", "direct"),
    answer=("direct", "padded_symm", "padded"),
    wrong={
        ("padded_symm", "direct", "padded"): "They push the same bytes. But padded_symm copies the "
        "result twice afterwards.",
        ("padded", "padded_symm", "direct"): "The order is fastest first: less work, less time.",
    },
    why="`padded` pays for the collective and for its copies, `padded_symm` still strips and "
    "reorders, `direct` does neither.",
)
LESSON.ask(
    "alpha",
    "16 KB by direct: what fraction (0 to 1) of the time is alpha, which does not depend on bytes?",
    answer=0.9,
    unit="of the time",
    tolerance=0.45,
    wrong={
        0.1: "Bytes are cheap: at several GB/s, 16 KB take a few µs. Barriers cost more.",
        0.3: "Look at the left end of the sweep: doubling the bytes hardly changes the time.",
    },
    why="A small gather mostly waits at barriers: fewer barriers help, and bandwidth does not.",
)
LESSON.ask(
    "passes",
    "padded_symm makes two more copies of the result than direct. How many times as fast is "
    "direct at 16 MiB?",
    answer=4.0,
    unit="times",
    tolerance=0.7,
    wrong={
        1.0: "A copy of all bytes costs about as much as the push. Count passes.",
        20.0: "That is more than direct gains over padded, whose collective is slow as well.",
    },
    why="Count passes: push, strip and reorder, and a quarter pass to fill the symmetric shard, "
    "against push alone. The ratio holds while memory bandwidth is the limit.",
)
LESSON.ask(
    "padding",
    "64 sequences of 9 tokens over 4 ranks, zigzag: how many times the bytes does the padded wire "
    "carry?",
    answer=768 / 576,
    unit="times",
    tolerance=0.02,
    wrong={
        1.0: "9 tokens are 8 blocks, and one of them is longer. Which rank owns it, each time?",
        9
        / 8: "That is 9 tokens against 8. Each rank pads to the longest: 3 rows where most have 2.",
        1.5: "Rank 0 holds 3 rows where the others hold 2. On average they hold 9/4.",
    },
    why="Rank 0 gets the odd token of every sequence: 3 rows, the others 2. All pad to 3: 12 slots "
    "for 9 tokens. `direct` sends no padding.",
)
LESSON.ask(
    "stops",
    "8 × H100: symmetric memory is 1.86 times as fast at 2 MiB. And at 128 MiB?",
    answer=1.06,
    unit="times",
    tolerance=0.04,
    wrong={
        1.86: "About 22 µs are saved, and at 128 MiB the bytes alone need more than 360 µs.",
        1.0: "Nearly: a gain of 6 % remains.",
        1.5: "Less. About 22 µs are saved, of 385 µs.",
        3.0: "The links are the same, and at 128 MiB they take most of the time.",
    },
    why="Measured in Megatron-LM#5596, as the minimum over the ranks of the kernel's time: 20.2 → "
    "10.9 µs, and 385.3 → 363.2 µs. The saving grows from 9.3 to about 22 µs, the time far more.",
)
LESSON.ask(
    "nodes",
    "256 MB over 16 GPUs, as two nodes of 8 H100 (NVLink 360 GB/s, 45 GB/s of network per "
    "GPU), or inside one NVL72 (720 GB/s). How many times as long do two nodes take, by the model?",
    answer=2.06,
    unit="times",
    tolerance=0.12,
    wrong={
        16: "That is 720 / 45. But only the other node's half crosses the network, once per node, "
        "and 8 network adapters share it.",
        3.1: "That adds network and NVLink. They work at the same time: the slower one counts.",
        1.0: "Every GPU still has to receive 240 MB, over an NVLink of half the rate.",
    },
    why="The other node's 128 MB enter through 8 adapters, 16 MB each: 356 µs. Meanwhile every GPU "
    "receives 240 MB over NVLink: 667 µs, against 333 µs in the NVL72. NVLink limits large "
    "gathers, not the network.",
)
