"""Notebook 3: its predictions, and what each typical wrong answer overlooks."""

from __future__ import annotations

from cpkit.notebook.style import byte_words
from cpkit_lessons.cost_presets import RING_AND_SYMMETRIC_US
from cpkit_lessons.lesson import Lesson
from cpkit_lessons.prediction import Prediction
from cpkit_lessons.world import World

LESSON = Lesson("03_allgather_perf")
begin, explain_missing_names = LESSON.begin, LESSON.explain_missing_names
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress


@LESSON.asks
def busbw(world: World) -> Prediction:
    """Ask for the busbw of 8.4 MB per rank in 20 ms."""
    n = world.cp_size
    total, algbw, answer = 8.4 * n, 0.42 * n, 0.42 * (n - 1)
    return Prediction(
        f"{n} ranks hold 8.4 MB each, and the gather takes 20 ms. What is busbw, in GB/s?",
        answer=answer,
        unit="GB/s",
        tolerance=0.02,
        wrong={
            algbw: f"That is algbw, S / t. Each rank already holds 1/{n} of S, which crosses no "
            "link.",
            0.42: f"That is one rank's 8.4 MB / t. S is the whole result: {total:.1f} MB.",
            0.42 * (n - 1) / n: f"The factor is right. But S is the whole result, {n} · 8.4 MB, "
            "not one rank's 8.4 MB.",
            algbw * n / (n - 1): "The factor is (cp−1)/cp, not its inverse: less crosses the links "
            "than is gathered.",
            answer * 1e9 / 2**30: "You divided by 2³⁰. In nccl-tests a GB is 10⁹ bytes.",
        },
        why=f"S = {total:.1f} MB, algbw = S / t = {algbw:.2f} GB/s, busbw = {algbw:.2f} · "
        f"{n - 1}/{n}. The code of nccl-tests once reported S / t · (cp−1)/cp as algbw, although "
        "its documentation said S / t (nccl-tests#45).",
    )


@LESSON.asks
def late(world: World) -> Prediction:
    """Ask for the time of a gather whose rank r starts r · 5 ms late."""
    steps = world.cp_size - 1
    return Prediction(
        "Rank r arrives r · 5 ms late, and no barrier runs before the clock starts. What is the "
        "longest time, in ms, that any rank measures for a small gather?",
        answer=5.0 * steps + 1,
        unit="ms",
        tolerance=0.2,
        wrong={
            0.5: "That is roughly the time of the gather alone. But rank 0 waits for others while "
            "its clock runs.",
            5.0: f"That is the delay of rank 1. Rank 0 waits for the last rank, which is {steps} · "
            "5 ms late.",
            5.0
            * (steps + 1): f"Ranks are numbered from 0, so the last rank is {steps} · 5 ms late.",
            2.5 * steps * (steps + 1): "Rank 0 waits for the latest rank; the delays of the ranks "
            "do not add up.",
        },
        why=f"Rank 0 waits {steps} · 5 ms while its clock runs. The gather is not slow: the "
        "measured time contains the delay of earlier work. A barrier before the clock removes it. "
        "On a busy machine the gather itself adds milliseconds.",
    )


LESSON.ask(
    "damage",
    "Three mistakes each report a wrong time. What is their order by the ratio of the reported "
    "time to the right time, the smallest ratio first?",
    choices=("no barrier", "fastest rank", "no wait"),
    answer=("no wait", "fastest rank", "no barrier"),
    wrong={
        ("fastest rank", "no wait", "no barrier"): "The fastest rank still moved its bytes. "
        "A call whose end is not waited for may have moved nothing yet.",
        ("no barrier", "fastest rank", "no wait"): "Without a barrier the early ranks wait "
        "while their clocks run, so the time grows.",
    },
    why="Without a wait, the clock shows only the launch. The fastest rank ends a little before "
    "the slowest, or at the same time, so its ratio is just below 1 or equal to it. Without a "
    "barrier, the clock of an early rank also counts how late the others are.",
)


@LESSON.asks
def ranking(world: World) -> Prediction:
    """Ask for the order of three algorithms at a medium size.

    Where ranks share a GPU, `padded` is staged in the pool, and differs little from `padded_symm`.
    """
    answer = ("direct", "padded_symm", "padded")
    why = (
        "`padded` pays for the collective and for its copies, `padded_symm` still strips and "
        "reorders, `direct` does neither."
    )
    if world.shares_gpu:
        answer = ("direct", "padded", "padded_symm")
        why = (
            "NCCL does not support two ranks on one GPU. So `padded` copies its shard into the "
            "pool, and the peers pull it from there: about as much work as in `padded_symm`. Both "
            "strip and reorder, and `direct` does neither."
        )
    return Prediction(
        f"{world.cp_size} ranks gather {byte_words((16 << 20) / world.shrink)}. What is the order "
        "of the three algorithms, the fastest first?",
        choices=("padded", "padded_symm", "direct"),
        answer=answer,
        wrong={
            ("padded_symm", "direct", "padded"): "padded_symm and direct push the same rows. But "
            "padded_symm copies the result twice afterwards.",
            ("padded", "padded_symm", "direct"): "This order starts with the algorithm that does "
            "the most work. The fastest does the least.",
        },
        why=why,
    )


@LESSON.asks
def alpha(world: World) -> Prediction:
    """Ask for the fraction of alpha at the smallest size."""
    size = byte_words(world.sizes()[0])
    return Prediction(
        f"direct gathers {size}. According to the fitted line, what fraction of the time is alpha, "
        "the part that does not depend on the number of bytes?",
        answer=0.9,
        unit="of the time",
        between=(0, 1),
        tolerance=0.45,
        wrong={
            0.1: f"Bytes are cheap: at several GB/s, {size} take a few µs. The rest costs more.",
            0.3: "Look at the left end of the sweep: doubling the bytes hardly changes the time.",
        },
        why="A small gather hardly moves bytes. Its time is a fixed cost: on the CPU Python code "
        "and barriers, on a GPU the start of a kernel and signals. Fewer steps help, and "
        "bandwidth does not.",
    )


@LESSON.asks
def passes(world: World) -> Prediction:
    """Ask how many rows one rank writes in padded_symm, by count."""
    cp = world.cp_size
    return Prediction(
        f"{cp} ranks gather N rows, N/{cp} from each, without padding. How many rows does one rank "
        "write in all steps of padded_symm together, as a multiple of N?",
        answer=3 + 1 / cp,
        unit="N",
        tolerance=0.01,
        wrong={
            1.0: "That is the push alone, all that direct does. padded_symm also copies its shard "
            "before, and the whole result after it.",
            2.0: "That is strip and reorder. The push writes rows too.",
            2 + 2 / cp: f"A rank pushes its shard to {cp} ranks, itself included: that is N rows.",
            3.0: "Before the push, the rank copies its shard into symmetric memory.",
            4.0: f"The copy into symmetric memory has only the rank's own shard, N/{cp} rows.",
        },
        why=f"The rank copies its shard into symmetric memory (N/{cp}), pushes it to {cp} ranks, "
        "itself included (N), strips (N) and reorders (N). direct only pushes.",
    )


@LESSON.asks
def padding(world: World) -> Prediction:
    """Ask for the ratio of slots to tokens on the padded wire, for sequences of 2·cp + 1."""
    cp = world.cp_size
    tokens = 2 * cp + 1
    return Prediction(
        f"Zigzag spreads 64 sequences of {tokens} tokens over {cp} ranks. What is the ratio of "
        "slots to tokens on the padded wire?",
        answer=3 * cp / tokens,
        unit="times",
        tolerance=0.02,
        wrong={
            1.0: f"{tokens} tokens form {2 * cp} blocks, and one of them is longer. Its owner is "
            "the same rank in every sequence.",
            tokens / (2 * cp): f"That is {tokens} tokens against {2 * cp}. Every rank pads to the "
            "longest shard: 3 rows per sequence, though all but rank 0 hold only 2.",
            1.5: "Rank 0 holds 3 rows where the others hold 2. The average over all ranks is "
            f"{tokens}/{cp}.",
        },
        why="Rank 0 gets the extra token of every sequence, so it holds 3 rows and the others 2. "
        f"All pad to 3: {3 * cp} slots for {tokens} tokens. `direct` sends no padding.",
    )


_SHORTENED = {
    size >> 20: f"from {ring_us} to {symmetric_us} µs"
    for size, (ring_us, symmetric_us) in RING_AND_SYMMETRIC_US.items()
}
LESSON.ask(
    "stops",
    f"On 8 × H100, symmetric memory shortens a gather of 2 MiB {_SHORTENED[2]} (1.86 times as "
    f"fast), and one of 32 MiB {_SHORTENED[32]} (1.25 times). By what factor does it speed up a "
    "gather of 128 MiB, which takes 363.2 µs with it?",
    answer=1.06,
    unit="times",
    tolerance=0.04,
    wrong={
        1.86: "About 22 µs are saved, and at 128 MiB the bytes alone need almost 360 µs.",
        1.25: "The saved time, about 23 µs, hardly changes from 32 to 128 MiB.",
        1.0: "A gain of 6 % remains.",
        3.0: "The links are the same, and at 128 MiB they take most of the time.",
    },
    why="Megatron-LM#5596 measured 20.2 → 10.9 µs and 385.3 → 363.2 µs (rounded here), as the "
    "minimum over the ranks of the kernel's time. The saved time grows from 9.3 to about "
    "22 µs, and the total time grows far more.",
)
LESSON.ask(
    "clocks",
    "Two H100s gather 2.1 MB (2091008 bytes in the table of section 7). In a Python loop, a call "
    "of `padded_symm` takes 2.1 times as long as a call of `seed`, the same pipeline in plain "
    "torch over NCCL's ring. How many times as long does the device work on `padded_symm` as on "
    "`seed`?",
    answer=0.84,
    unit="times",
    tolerance=0.08,
    wrong={
        2.1: "That is the ratio of the loop, and most of its time is Python.",
        1.0: "Both pad, gather, strip and reorder. But NCCL gathers with another kernel here.",
        0.4: "The symmetric kernel saves only a fifth of the collective, and the passes remain.",
    },
    why="The device time is 25.2 µs for `seed` and 21.1 µs for `padded_symm`. The ring takes 20.5 "
    "µs, the symmetric kernel 16.7 µs, and pad, strip and reorder 4 to 5 µs in both.",
)
LESSON.ask(
    "kernels",
    "Four H100s gather with NCCL 2.28.9, with no buffer registered, with the receive buffer only, "
    "or with both. For how many of these three does NCCL select a symmetric kernel?",
    answer=1,
    between=(0, 3),
    tolerance=0.01,
    wrong={
        0: "Registration has an effect: with both buffers registered, NCCL does select one.",
        2: "That is right for 2.29 and later, which require the receive buffer only.",
        3: "Without a registered buffer, a kernel has no window of its peers to store into.",
    },
    why="2.28.9 requires both buffers. With the receive buffer alone it keeps its ring, and "
    "gives no warning; you have to read its log. sglang#24040, as it was merged, registered only "
    "the receive buffer.",
)
LESSON.ask(
    "nodes",
    "16 GPUs gather 256 MB. They are either two nodes of 8 H100 (start 30 µs, NVLink 328 GB/s, "
    "network 45 GB/s per GPU), or a part of one NVL72, a rack of 72 GPUs on one NVLink (start 5.3 "
    "µs, 656 GB/s). According to the model, what is the ratio of the time of the two nodes to that "
    "of the NVL72?",
    answer=1.92,
    unit="times",
    tolerance=0.05,
    wrong={
        2.05: "That lets all 240 MB arrive over NVLink. But 16 MB of them arrive through the GPU's "
        "own network adapter.",
        14.6: "That is 656 / 45. But only the other node's half crosses the network, once per "
        "node, and 8 network adapters share it.",
        2.9: "That adds the times of network and NVLink. They work at the same time, so the one "
        "that takes longer counts.",
        1.0: "Every GPU still has to receive 224 MB over an NVLink of half the rate.",
    },
    why="Every GPU receives 240 MB. The other node's 128 MB enter through 8 adapters, 16 MB each: "
    "356 µs. Meanwhile the remaining 224 MB arrive over NVLink: 683 µs, against 366 µs for all 240 "
    "in the NVL72. With their starts, 30 and 5.3 µs, these are 713 and 371 µs. NVLink, not the "
    "network, limits large gathers.",
)
