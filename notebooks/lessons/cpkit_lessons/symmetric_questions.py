"""Notebook 2: what it asks before each run."""

from __future__ import annotations

from cpkit_lessons.lesson import Lesson
from cpkit_lessons.throwaway import SYMPTOMS

LESSON = Lesson("02_symmetric_memory")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress

LESSON.ask(
    "same",
    "Four ranks make the same symmetric buffer. What of it is sure to be equal on all ranks?",
    choices=("address", "offset", "both"),
    answer="offset",
    wrong={
        "address": "Each process has an address space of its own, and maps a segment where there "
        "is room. Nobody promises the same place.",
        "both": "Addresses may come out equal. That is luck of the allocator, and nobody promises "
        "it again after the next allocation.",
    },
    why="Symmetric means: the same offset in everybody's segment. All ranks compare it when the "
    "memory is made. A pointer is for its own process.",
)
LESSON.ask(
    "stale",
    "1000 rounds of put and read with no barrier, four ranks: which share of the reads is wrong?",
    choices=("under 1 %", "1 to 10 %", "over 10 %"),
    answer="over 10 %",
    wrong={
        "under 1 %": "That would need ranks in lockstep. Nothing keeps them there: one runs while "
        "another sleeps, and laps it.",
        "1 to 10 %": "Ranks drift apart by whole rounds, not by a few instructions, and stay so.",
    },
    why="A rank's read of its own slot is always right: 1/cp of all. Of the others nearly every "
    "one "
    "can be wrong. A missing barrier is no rare event; in a *test* with the same data in every "
    "round it is an invisible one.",
)
LESSON.ask(
    "orders",
    "Two ranks take four steps each. In how many orders can these eight steps happen?",
    answer=70,
    unit="orders",
    close=0.01,
    wrong={
        16: "Twice 8 steps, or 2^4? Each order is a choice of which 4 of the 8 places are rank "
        "0's.",
        256: "2^8 also counts orders in which one rank takes more than four steps.",
        40320: "8! would let a rank's own steps change places; these stay in program order.",
    },
    why="Choose the 4 places of rank 0 among 8: 8!/(4!·4!) = 70. With 3 ranks it is 34,650. Luck "
    "does not find the bad one; a search does, because many orders lead to the same state.",
)
LESSON.ask(
    "smallest",
    "Two ranks, no barrier: how many steps has the shortest schedule in which a read is wrong?",
    answer=3,
    unit="steps",
    close=0.01,
    wrong={
        1: "The first step of a rank is a put; before it reads it has to put to both.",
        4: "One rank alone is enough: the other need not have begun.",
        8: "The other rank need not take a single step.",
    },
    why="One rank puts, puts and reads, before the other has begun. The smallest failure is the "
    "best "
    "explanation of a race: everything that is not needed is gone from it.",
)
LESSON.ask(
    "round",
    "Now with one barrier, between the puts and the reads: which round does the first wrong read "
    "of the shortest failing schedule want?",
    answer=1,
    close=0.01,
    wrong={
        2: "The *write* is of round 2. The read that it spoils still wants round 1.",
        0: "Rounds count from 1; and with a barrier before the read, nothing is stale.",
    },
    why="The reader of round 1 is slow; the writer goes on to round 2 and overwrites what was "
    "not yet "
    "read: a write after read. So you see it only when a buffer is used *again*, and a test of one "
    "round passes.",
)
LESSON.ask(
    "held",
    "Eight ranks in a ring, each reads its left neighbour only. Rank 3 has not begun. With signals "
    "instead of barriers, how many of the 7 others cannot finish round 1?",
    answer=1,
    unit="of 7",
    close=0.01,
    wrong={
        7: "That is the barrier: everybody waits for everybody.",
        2: "Rank 2 writes *to* rank 3 and waits for nothing from it in round 1.",
        0: "Rank 4 needs what rank 3 has not written.",
    },
    why="A signal waits for the one whose data you need. A barrier waits for all, and costs more "
    "the "
    "more ranks there are.",
)
LESSON.ask(
    "spills",
    "A 16 MB arena. Requests of 2, 4, 8, 24, 4, 24, 48, 24, 48 MB, one after the other, each let "
    "go "
    "before the next: how many of the nine spill?",
    answer=2,
    unit="requests",
    close=0.01,
    wrong={
        5: "Five are larger than the arena. But a spilled segment stays in the pool: the second "
        "request of its size finds it.",
        3: "24, 48, and …? The third large one fits a segment that an earlier one made.",
        0: "24 MB do not fit 16 MB.",
    },
    why="Each *new largest* request spills once. So the cost comes exactly with the longest prompt "
    "you have seen so far, and a benchmark that repeats one size never shows it after its first.",
)
LESSON.ask(
    "recv",
    "Receive buffer registered, send buffer ordinary, everything else right. NCCL 2.28.9 takes …?",
    choices=("symmetric", "fallback", "an error"),
    answer="fallback",
    wrong={
        "symmetric": "From 2.29.2 on, yes. 2.28.9 asks for both windows.",
        "an error": "NCCL picks another kernel and says nothing.",
    },
    why="Up to 2.29.1 an all-gather needs *both* buffers in symmetric windows; from 2.29.2 the "
    "receive buffer is enough. sglang#37337 counted it: 0 symmetric calls, 499 over the ring.",
)


def _symptom(case: str, what: str, *, answer: str, why: str, wrong: dict[str, str]) -> None:
    LESSON.ask(
        case,
        f"{what}: what do the ranks see?",
        choices=SYMPTOMS[:4],
        answer=answer,
        wrong=wrong,
        why=why,
    )


_symptom(
    "skips_the_rendezvous",
    "Rank 1 never comes to make symmetric memory",
    answer="error after the deadline",
    why="Making symmetric memory is a collective. The others wait for the one that does not come; "
    "the deadline is what turns a hang into a sentence with a name in it. NCCL's registration "
    "has none: sglang#36943 hung while /health said 200.",
    wrong={
        "error at once": "At once nobody can know that rank 1 will not come: late and never look "
        "the same.",
    },
)
_symptom(
    "sizes_differ",
    "Rank 1 makes a scratch buffer of another size",
    answer="error at once",
    why="All ranks come, and compare a digest of all they have allocated. NCCL does not compare: "
    "equal offsets are the user's duty there, and the same mistake is silent.",
    wrong={
        "silently wrong": "It would be, without the comparison at the meeting: the next block "
        "stands at another offset on each rank.",
    },
)
_symptom(
    "receive_only",
    "Only the receive buffer is registered, and one of the NCCLs is 2.28.9",
    answer="slow but right",
    why="No rank gets an error, every row is right, and only the path differs: by rule, NCCL "
    "2.28.9 falls back and 2.29.7 does not.",
    wrong={
        "error at once": "Nothing is wrong with the result. The ordinary collective takes any "
        "buffer.",
    },
)
_symptom(
    "wrong_group",
    "Both buffers are in the pool of another group",
    answer="slow but right",
    why="Registered, but with another group: not symmetric for this one. sglang#19329 lived with "
    "it, and its own books said 'registered'.",
    wrong={
        "silently wrong": "The ordinary collective is always there to fall back to, and it is "
        "right.",
    },
)
_symptom(
    "divergent_free_lists",
    "Rank 1 has kept a block that rank 0 has freed, and nobody compares books",
    answer="silently wrong",
    why="No rank has an error, and the rows lie elsewhere: over memory that somebody may be using. "
    "pytorch#178138 is this bug; under a captured graph it is sglang#34230.",
    wrong={
        "error at once": "Who should notice? Each rank's own books are in order. Only a "
        "comparison shows it.",
    },
)
_symptom(
    "shared_memory_is_full",
    "The arena does not fit the shared memory that is left",
    answer="error at once",
    why="The pages are reserved before they are used, so it is an error in words, on all ranks. "
    "Without the reservation it would be a bus error at the first touch, much later.",
    wrong={
        "error after the deadline": "The rank without room says so at the meeting, so nobody "
        "waits in vain.",
    },
)
_symptom(
    "a_rank_dies",
    "Rank 1 is killed before the gather",
    answer="error after the deadline",
    why="The survivor can only say that rank 1 did not come. The exit code says why: look at *all* "
    "ranks before you blame the one that complains. torchrun ends the survivors by itself.",
    wrong={
        "error at once": "A peer's memory does not say that its process is dead; the mapping "
        "stays valid.",
    },
)
