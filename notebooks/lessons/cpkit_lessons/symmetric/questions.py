"""Notebook 2: its predictions, and what each typical wrong answer overlooks."""

from __future__ import annotations

from cpkit_lessons.failure_lab import SYMPTOMS
from cpkit_lessons.lesson import Lesson
from cpkit_lessons.prediction import Prediction
from cpkit_lessons.world import World

LESSON = Lesson("02_symmetric_memory")
begin, explain_missing_names = LESSON.begin, LESSON.explain_missing_names
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress


@LESSON.asks
def same(world: World) -> Prediction:
    """Ask what is equal on all ranks."""
    return Prediction(
        f"All {world.cp_size} ranks allocate the same symmetric buffer. What is guaranteed to be "
        "equal on all ranks?",
        choices=("address", "offset", "both"),
        answer="offset",
        wrong={
            "address": "Each process has its own address space, and maps a segment where there is "
            "room. The addresses need not be equal.",
            "both": "Addresses may happen to be equal, but nothing guarantees it.",
        },
        why="Symmetric means: the same offset in every rank's segment. All ranks allocate the "
        "same sizes in the same order, so they compute the same offset. cpkit's ranks compare "
        "their allocations at the next agreement, the exchange of small messages with which "
        "every call of all_gather_kv begins. A pointer is valid only in its own process.",
    )


@LESSON.asks
def stale(world: World) -> Prediction:
    """Ask for the fraction of wrong reads without a barrier."""
    cp = world.cp_size
    return Prediction(
        f"{cp} ranks run 1000 rounds of put and read without a barrier. What fraction of the reads "
        "is wrong?",
        choices=("under 1 %", "1 to 10 %", "over 10 %"),
        answer="over 10 %",
        wrong={
            "under 1 %": "That would need ranks in lockstep. Without a barrier, nothing keeps them "
            "together, so one rank can get whole rounds ahead.",
            "1 to 10 %": "Ranks drift apart by whole rounds, not by instructions, and stay apart.",
        },
        why=f"A rank's read of its own slot is always right: 1/{cp} of all reads. Any of the other "
        "reads can be wrong, and nothing limits how many of them are. But a test with the same "
        "data in every round detects none of them, except in memory that was never written.",
    )


LESSON.ask(
    "orders",
    "Two ranks take four steps each. In how many orders can these eight steps happen?",
    answer=70,
    unit="orders",
    tolerance=0.01,
    wrong={
        16: "That is 2 · 8, or 2^4. An order is a choice of 4 of the 8 positions, those of rank 0.",
        256: "2^8 also counts orders in which one rank takes more than four steps.",
        40320: "8! would also reorder the steps of one rank; these stay in program order.",
    },
    why="Choose the 4 positions of rank 0 among 8: 8!/(4!·4!) = 70. With 3 ranks of four steps "
    "each, there are 34,650. Random runs can miss an order that fails. A search of all orders "
    "misses none, and it is fast, because many orders lead to the same state.",
)
LESSON.ask(
    "smallest",
    "Two ranks run without a barrier. How many steps does the shortest order with a wrong read "
    "have?",
    answer=3,
    between=(1, 8),
    unit="steps",
    tolerance=0.01,
    wrong={
        1: "The first step of a rank is a put, and it puts to both ranks before it reads.",
        4: "The steps of one rank are enough: put, put, read.",
        8: "The other rank need not take a single step.",
    },
    why="One rank puts, puts and reads, before the other starts. The smallest failure is the "
    "best explanation of a race: it contains no unnecessary step.",
)
LESSON.ask(
    "round",
    "Now each round has one barrier, between the puts and the reads, and rounds are numbered from "
    "1. In the shortest order that fails, which round does the first wrong read expect?",
    answer=1,
    tolerance=0.01,
    wrong={
        2: "The write belongs to round 2. The read that it breaks still expects round 1.",
        0: "Rounds are numbered from 1. And with a barrier before the reads, no read is stale.",
    },
    why="The reader is still in round 1. The writer continues with round 2, and overwrites a slot "
    "that has not been read yet. So the error appears only when a buffer is used again, and a test "
    "of one round passes.",
)
LESSON.ask(
    "held",
    "Eight ranks form a ring, and each puts its row only to its right neighbour. Rank 3 has not "
    "started. With signals instead of barriers, how many of the 7 other ranks cannot finish round "
    "1?",
    answer=1,
    unit="of 7",
    between=(0, 7),
    tolerance=0.01,
    wrong={
        7: "That is the barrier: all ranks wait for all others.",
        2: "Rank 2 writes to rank 3, and waits for nothing from it in round 1.",
        0: "Rank 4 needs the row that rank 3 has not written.",
    },
    why="With signals, a rank of this ring waits in round 1 only for the rank whose data it needs. "
    "At a barrier it waits for all ranks, so one late rank delays all of them.",
)


@LESSON.asks
def spills(world: World) -> Prediction:
    """Ask how many requests do not fit the arena."""
    arena_mb, requests_mb = world.requests_mb()
    arena, sizes = f"{arena_mb:g}", [f"{mb:g}" for mb in requests_mb]
    large, largest = sizes[3], sizes[-1]
    return Prediction(
        f"An arena has {arena} MB. Nine requests of {', '.join(sizes)} MB follow each other, and "
        "each is released before the next. How many of the nine spill?",
        answer=2,
        unit="requests",
        between=(0, 9),
        tolerance=0.01,
        wrong={
            5: "Five are larger than the arena. But a spilled segment stays in the pool, and "
            "serves later requests of that size.",
            3: f"The first requests of {large} and of {largest} MB spill. The other three large "
            "requests fit a segment that an earlier one registered.",
            0: f"A request of {large} MB does not fit an arena of {arena} MB.",
        },
        why="A request spills if it is larger than the arena and than every request before it. So "
        "the cost appears with the longest prompt so far. A benchmark that repeats one size shows "
        "it only in its first iteration.",
    )


LESSON.ask(
    "recv",
    "The receive buffer is registered, the send buffer is not, and everything else is right. What "
    "happens with NCCL 2.28.9: the symmetric path, the fallback, or an error?",
    choices=("symmetric", "fallback", "an error"),
    answer="fallback",
    wrong={
        "symmetric": "That is right for 2.29 and later, but 2.28.9 requires windows for both "
        "buffers.",
        "an error": "NCCL selects another kernel without an error. Only its log shows that.",
    },
    why="Up to 2.28, an all-gather needs both buffers in symmetric windows. Since 2.29, the "
    "receive buffer is enough. With only the receive buffer registered, sglang#37337 counted 0 "
    "calls of symmetric kernels and 499 of ordinary ones; its version of NCCL is not known here.",
)


def _ask_symptom(case: str, what: str, *, answer: str, why: str, wrong: dict[str, str]) -> None:
    LESSON.ask(
        case,
        f"{what}. What do the ranks observe?",
        choices=SYMPTOMS[:4],
        answer=answer,
        wrong=wrong,
        why=why,
    )


_ask_symptom(
    "skips_the_rendezvous",
    "Rank 1 does not call the rendezvous for symmetric memory",
    answer="error after the deadline",
    why="Creating a segment is a collective, and rank 0 waits for rank 1. The deadline turns a "
    "hang into an error that names the rank. NCCL's registration has no deadline: in "
    "sglang#36943, the server hung while /health returned 200.",
    wrong={
        "error at once": "A rank that is late and a rank that never arrives look the same until "
        "the deadline.",
    },
)
_ask_symptom(
    "sizes_differ",
    "Rank 1 allocates a scratch buffer of another size",
    answer="error at once",
    why="All ranks arrive, and compare a digest of all allocations. NCCL does not compare them: "
    "there the caller has to guarantee equal offsets, and the same mistake raises no error.",
    wrong={
        "silently wrong": "That is right for an allocator that does not compare allocations: the "
        "next block has a different offset on each rank.",
    },
)
_ask_symptom(
    "receive_only",
    "Only the receive buffer is registered, and one of the transports is NCCL 2.28.9",
    answer="fast path missed",
    why="No rank raises an error, every row is right, and only the path differs: NCCL 2.28.9 "
    "falls back, and 2.29.7 does not. Missed does not always mean slower: on two H100s with "
    "2.28.9, NCCL gathered 268 MB in 451 µs with only the receive buffer registered, in 556 µs "
    "with none, and in 596 µs with both (benchmarks/results/2026-11-28-gpu.json, commit "
    "6b142c512aef). The first two are both NCCL's ring; the record does not say why it is faster "
    "with a registered receive buffer.",
    wrong={
        "error at once": "The result is right. The ordinary collective takes any buffer.",
    },
)
_ask_symptom(
    "wrong_group",
    "Both buffers are in the pool of another group",
    answer="fast path missed",
    why="A buffer registered with another group is not symmetric for this one. sglang#19329 is "
    "this bug: SGLang's own records said 'registered'.",
    wrong={
        "silently wrong": "The fallback is the ordinary collective, whose result is right.",
    },
)
_ask_symptom(
    "divergent_free_lists",
    "Rank 1 has kept a block that rank 0 has freed, and the free lists are not compared",
    answer="silently wrong",
    why="No rank raises an error. The rows are written to the wrong place, over memory that may be "
    "in use. pytorch#178138 is this bug, and sglang#34230 is the same under a captured graph.",
    wrong={
        "error at once": "Each rank's own free list is consistent. Only a comparison between ranks "
        "shows the difference.",
    },
)
_ask_symptom(
    "shared_memory_is_full",
    "The arena does not fit into the free shared memory",
    answer="error at once",
    why="Before any page is used, the ranks compare the size with the free space, and then reserve "
    "the pages. So the failure is an error message on all ranks. Without that it would be a bus "
    "error at the first access, much later.",
    wrong={
        "error after the deadline": "The rank without room reports it in the exchange, so no rank "
        "waits for the deadline.",
    },
)
_ask_symptom(
    "a_rank_dies",
    "Rank 1 is killed before the gather",
    answer="error after the deadline",
    why="The other rank can only report that rank 1 did not arrive; the exit code of rank 1 says "
    "that it was killed. Look at all ranks before you blame the one that reports the error. Under "
    "torchrun, the launcher sees the dead rank and ends the others.",
    wrong={
        "error at once": "The mapping of a peer's memory stays valid when its process dies, so "
        "nothing shows that it is dead.",
    },
)

LESSON.ask(
    "slot",
    "Pages have 4 slots, and the request has the pages 5, 2 and 0, in this order. Which slot of "
    "the cache holds token 6?",
    answer=10,
    between=(0, 23),
    tolerance=0.01,
    wrong={
        6: "That is its position in token order. The cache stores it in one of the request's "
        "pages.",
        22: "That is slot 2 of page 5, the first page of the request. Token 6 is in the second "
        "page.",
        2: "That is slot 2 of page 0, the third page of the request. Token 6 is in the second "
        "page.",
        9: "Page 2 is right. But tokens and slots are numbered from 0: token 4 is in slot 0 of "
        "that page.",
    },
    why="6 // 4 is 1, so token 6 is in the second page, which is page 2. 6 % 4 is 2, so it is in "
    "slot 2 of that page: 2 · 4 + 2.",
)
