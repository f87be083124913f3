# %% title [markdown]
# # 2 · Symmetric memory
#
# A collective hides how bytes travel. With *symmetric memory* a rank writes into a peer's memory as if it were
# its own. That is fast. It also moves the burden to you: nobody waits unless you say so, and nobody notices when you
# forget.
#
# **Time** 85 minutes. **Needs** any laptop: the ranks share POSIX shared memory. **Know before** notebook 1.
#
# You will be able to
# 1. say what is symmetric about symmetric memory, and compute a peer's pointer;
# 2. place barriers or signals so that no order of events can break a loop, and prove it;
# 3. size a pool so that nothing is registered at run time;
# 4. say whether a gather takes the fast path, from four facts and a version number;
# 5. go from what the ranks saw to what went wrong.
#
# {glossary: symmetric memory; segment; put, get; barrier; signal; stale (read after write); ahead (write after read)}

# %% connect tags=["nbval-ignore-output"]
import cpkit
from cpkit_lessons import symmetric as lesson

lesson.explain_missing_names()  # a cell that needs an earlier one then says which
lab = cpkit.connect()
world = lesson.begin(lab)

# %% setup
import pandas as pd
from cpkit_lessons import figures
from cpkit_lessons.simulate import smallest_failure

cp = world.cp_size
pd.set_option("display.max_colwidth", None)

# %% s1 [markdown]
# ## 1. What is symmetric?
#
# Every rank makes the same buffer: one file in shared memory each. Every rank maps *all* of them. So cp ranks hold
# cp² mappings (4 ranks hold 16), and each of them can be written like any other memory.

# %% same-predict
lesson.predict("same", ...)

# %% put
put = lab.put(cp, rounds=1)
print("offset on every rank:", put.offsets)

# %% addresses tags=["nbval-ignore-output"]
addresses = [hex(address) for address in put.addresses]
pd.DataFrame({"rank": range(cp), "address": addresses, "offset_bytes": put.offsets})

# %% same-reveal
same_offset = len(set(put.offsets)) == 1
lesson.reveal("same", "offset" if same_offset else "address")
assert same_offset, "else the memory is not symmetric"

# %% address-text [markdown]
# Are your addresses equal too? They may be: on one GPU, four processes were all given the same one. It is an accident.
# So never send a pointer to a peer. An offset is all it needs: it knows where *it* has mapped each segment.
# PyTorch's handle holds exactly that list (`buffer_ptrs`): the address of every rank's buffer, *as mapped here*.

# %% e1-task [markdown]
# ### Exercise 1 · A peer's pointer
#
# **Goal** Write `peer_pointer`. `pointer` is an address in rank `me`'s segment; `bases[r]` is where **this** process has
# mapped rank r's segment. Return the address, in this process, of the same byte of rank `peer`.
#
# **Example** `bases` = [1000, 5000]. On rank 0, address 1064 is offset 64. The same byte of rank 1 is at 5064:
# `peer_pointer(1064, 0, 1, [1000, 5000])` is 5064.
#
# **About** 3 minutes, ★☆☆


# %% e1
def peer_pointer(pointer, me, peer, bases):
    """Address of the same byte in the segment of `peer`."""
    # >>> your code
    #: return pointer
    return bases[peer] + (pointer - bases[me])
    # <<<


# %% e1-check
lesson.check_peer_pointer(peer_pointer)


# %% e1-mutant-offset-only
def peer_pointer(pointer, me, peer, bases):
    return pointer - bases[me]


# %% e1-mutant-base-of-the-peer
def peer_pointer(pointer, me, peer, bases):
    return bases[peer]


# %% e1-mutant-wrong-way
def peer_pointer(pointer, me, peer, bases):
    return pointer + bases[me] - bases[peer]


# %% e1-help [markdown]
# What do my buffer and the peer's have in common? Not the address.
#
# ---
# Address minus base is the offset; base plus offset is an address.
#
# ---
# One line: the peer's base, plus my pointer minus my base.
#
# ---
# **Why** This line is all of symmetric memory. Every kernel that stores to a peer computes it, once per peer, from a table
# of bases that was made when the segment was registered.
#
# **Another way** Keep one difference per peer, `bases[peer] - bases[me]`, and add it. NVSHMEM's device code loads the peer's base
# from a table, as you did. NCCL maps the segments of all ranks at a fixed distance from each other (`lsaFlatBase`, `stride4G`), so
# that its difference is `(peer - me) · stride`.

# %% s2 [markdown]
# ## 2. Put and get
#
# In that round each rank *put* a stamp into its own slot of every peer's memory. Then it read its own memory. A stamp
# says who wrote it, and in which round.

# %% who
assert (put.writers == range(cp)).all(), "slot w of every rank was written by rank w"
assert (put.matrix == 1).all(), "and all of it in round 1"
figures.show(figures.who_wrote_where(put.stamps, rounds=1))

# %% get-text [markdown]
# A *put* writes into the peer's memory; a *get* reads from it. Who has to wait differs:
#
# | | data moves | the owner of the memory must | the other side must |
# |---|---|---|---|
# | put (push) | me → peer | know when it has arrived | know when it may write *again* |
# | get (pull) | peer → me | know when it may write *again* | know when the data are there |
#
# Two waits either way: one before the data are read, one before the memory is used again.

# %% s3 [markdown]
# ## 3. Take the barriers away
#
# 1000 rounds on the real ranks. In each all put, all meet at a barrier, all read, all meet again.

# %% with-barrier
safe = lab.put(cp, rounds=1000, barrier=True)
print(f"{safe.reads} reads: {safe.stale} stale, {safe.ahead} ahead")
assert (safe.stale, safe.ahead) == (0, 0)

# %% stale-predict
lesson.predict("stale", ...)

# %% without-barrier tags=["nbval-ignore-output"]
unsafe = lab.put(cp, rounds=1000, barrier=False)
wrong = (unsafe.stale + unsafe.ahead) / unsafe.reads
print(f"{unsafe.reads} reads: {unsafe.stale} stale, {unsafe.ahead} ahead: {wrong:.0%} wrong")
for example in unsafe.examples[:3]:
    print(" ", example)
assert wrong > 0, "without a barrier somebody reads too early or too late"

# %% stale-reveal
classes = {"under 1 %": wrong < 0.01, "1 to 10 %": 0.01 <= wrong <= 0.1, "over 10 %": wrong > 0.1}
lesson.reveal("stale", max(classes, key=classes.get))

# %% names-text [markdown]
# The round in the stamp gives the two failures their names:
#
# - **stale**, a *read after write* that came too early: the reader was there before the writer;
# - **ahead**, a *write after read* that came too early: the writer had begun the next round.
#
# Now think of a test that gathers the same values in every round. It would have passed all of this.

# %% s4 [markdown]
# ## 4. Every order there is
#
# A thousand rounds on one machine show what *did* happen. What *can* happen? Here is the loop as a small program. Each
# `yield` is one step that peers can see; between two steps of a rank the others may do anything.
#
# ```python
# def no_barrier(me):
#     for number in me.rounds:
#         for peer in me.all_ranks:
#             yield me.put(peer, number)      # my stamp of this round into my slot there
#         for writer in me.all_ranks:
#             yield me.read(writer, number)   # must hold the stamp of this very round
# ```

# %% orders-predict
lesson.predict("orders", ...)

# %% orders-reveal
from math import comb

lesson.reveal("orders", comb(8, 4))

# %% smallest-predict
lesson.predict("smallest", ...)

# %% smallest
shortest = smallest_failure(lesson.no_barrier, 2, 1)
print(f"{shortest.states} states looked at")
print(shortest.failure)
figures.show(figures.schedule_timeline(shortest.failure))

# %% smallest-reveal
lesson.reveal("smallest", len(shortest.failure.events))

# %% one-text [markdown]
# Read it from left to right: a column is a step, a lane is a rank, an arrow is a write into a peer's memory. Rank 1 reads
# before rank 0 has done anything at all.
#
# So put a barrier between the puts and the reads. Is that enough?

# %% round-predict
lesson.predict("round", ...)

# %% one-barrier
alone = smallest_failure(lesson.one_barrier, 2, 1)
assert alone.failure is None, "one round alone can't fail"
again = smallest_failure(lesson.one_barrier, 2, 2)
figures.show(figures.schedule_timeline(again.failure))

# %% round-reveal
lesson.reveal("round", again.failure.events[-1].step.round)

# %% e2-task [markdown]
# ### Exercise 2 · Two barriers
#
# **Goal** Complete `exchange`, so that every interleaving of the ranks reads correct data. Use `yield me.barrier()`; without its
# `yield` a step does nothing. The check looks at *all* orders of 2 and 3 ranks and at random orders of 5.
#
# **Example** For one round of 2 ranks, `put 0, put 1, barrier, read 0, read 1` passes. For two rounds it fails, as you saw.
#
# **About** 4 minutes, ★☆☆


# %% e2
def exchange(me):
    """Rounds of put and read in which every read holds the stamp of its own round."""
    for number in me.rounds:
        for peer in me.all_ranks:
            yield me.put(peer, number)
        # >>> your code
        #: for writer in me.all_ranks:
        #:     yield me.read(writer, number)
        yield me.barrier()
        for writer in me.all_ranks:
            yield me.read(writer, number)
        yield me.barrier()
        # <<<


# %% e2-check
lesson.check_exchange(exchange)


# %% e2-mutant-barriers-without-yield
def exchange(me):
    for number in me.rounds:
        for peer in me.all_ranks:
            yield me.put(peer, number)
        me.barrier()
        for writer in me.all_ranks:
            yield me.read(writer, number)
        me.barrier()


# %% e2-mutant-before-the-read
def exchange(me):
    for number in me.rounds:
        for peer in me.all_ranks:
            yield me.put(peer, number)
        yield me.barrier()
        for writer in me.all_ranks:
            yield me.read(writer, number)


# %% e2-mutant-after-the-read
def exchange(me):
    for number in me.rounds:
        for peer in me.all_ranks:
            yield me.put(peer, number)
        for writer in me.all_ranks:
            yield me.read(writer, number)
        yield me.barrier()


# %% e2-mutant-reads-only-itself
def exchange(me):
    for number in me.rounds:
        for peer in me.all_ranks:
            yield me.put(peer, number)
        yield me.barrier()
        yield me.read(me.rank, number)
        yield me.barrier()


# %% e2-mutant-rank-0-is-in-a-hurry
def exchange(me):
    for number in me.rounds:
        for peer in me.all_ranks:
            yield me.put(peer, number)
        yield me.barrier()
        for writer in me.all_ranks:
            yield me.read(writer, number)
        if me.rank:
            yield me.barrier()


# %% e2-help [markdown]
# Look at the last two steps of the timeline above: what should the writer have waited for?
#
# ---
# One wait so that all have written before anybody reads; one so that all have read before anybody writes again.
#
# ---
# `yield me.barrier()` before the loop of reads, and once more after it.
#
# ---
# **Why** The first barrier orders write → read, the second read → next write. `meet()` and the exit barrier of every cpkit gather
# are these two; PyTorch's `_low_contention_all_gather` has them too.
#
# **Another way** Two buffers that take turns. A writer of round n+2 overwrites round n, and everybody who passed barrier
# n+1 has read it: one barrier per round is enough. You pay with memory. cpkit's own barrier (`sync/barrier.py`) does this.

# %% e3-task [markdown]
# ### Exercise 3 · Make it fail
#
# **Goal** Break `one_barrier` by hand: write the order in which two ranks take their steps, over two rounds, so that a
# read is *ahead*. In round 1 each rank takes 5 steps: put to 0, put to 1, barrier, read 0, read 1. Then round 2.
#
# **Example** `[1, 1, 1, 0, 0, 0]`: rank 1 puts twice and comes to the barrier, then rank 0 does. All reads can follow.
#
# **About** 5 minutes, ★★☆

# %% e3
# Whose turn it is: 0 or 1, step by step.
# >>> your code
#: order = [1, 1, 1, 0, 0, 0]
order = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
# <<<

# %% e3-check
lesson.check_order(order)

# %% e3-mutant-in-turns
order = [0, 1] * 10

# %% e3-mutant-through-the-barrier
order = [0] * 10

# %% e3-mutant-one-read-too-few
order = [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]

# %% e3-help [markdown]
# After the first six steps both are past the barrier. Who must be slow now, and who fast?
#
# ---
# Rank 0 reads both slots, and goes on to round 2. Its put to rank 1 spoils what rank 1 has not read yet.
#
# ---
# `[1, 1, 1, 0, 0, 0]`, then rank 0 four times (two reads, two puts), then rank 1 once.
#
# ---
# **Why** You have just done what a scheduler, a slow core or a page fault does. In GPU kernels it is a block that starts
# late. Not every race is between ranks: in NCCL 2.28.0 to 2.30.4 a symmetric kernel can read its input before the kernel that
# makes it on the *same* GPU is done, because a wait between the two is missing. No barrier of the ranks cures that. In SGLang
# with DCP and CUDA graphs, one request at a time, 0.100 of the answers were right instead of 0.575 (sglang#37768).
#
# **Another way** Let rank 1 be the fast one; the check accepts both.

# %% s5 [markdown]
# ## 5. Signals instead of barriers
#
# A barrier waits for everybody. Often you only need *one* peer's data. A **signal** is one word in a peer's memory:
#
# - `yield me.signal(peer)` sets my word at the peer; if it is still set, it waits until the peer has emptied it;
# - `yield me.wait(peer)` waits until the peer's word here is set, and empties it.
#
# These are the rules of `put_signal` and `wait_signal` of a PyTorch *handle* (what `rendezvous` returns), which compare and
# swap a word of the signal pad. The functions of the same names in the module also put data, and exist for the NCCL backend
# only. `channel` tells several words apart.

# %% held-predict
lesson.predict("held", ...)


# %% ring
def ring(me):
    right, left = (me.rank + 1) % me.size, (me.rank - 1) % me.size
    for number in me.rounds:
        yield me.put(right, number)
        yield me.signal(right, "full")
        yield me.wait(left, "full")
        yield me.read(left, number)


held = lesson.blocked_by(ring, size=8, slow=3)
print("with signals: ", held, "of 7 are held up by rank 3")
print("with barriers:", lesson.blocked_by(lesson.one_barrier, size=8, slow=3), "of 7")

# %% held-reveal
lesson.reveal("held", held)

# %% ring-fails
overrun = smallest_failure(ring, 2, 2)
figures.show(figures.schedule_timeline(overrun.failure))

# %% ring-text [markdown]
# And of course this ring has the old hole: `full` says that the data are there. Nobody says that they have been *read*.

# %% e4-task [markdown]
# ### Exercise 4 · Signals instead of barriers
#
# **Goal** The loop of exercise 2 without a barrier: every rank puts to every **other** rank (`me.peers`) and reads what they
# put here. No read may be wrong in any order, and no rank may wait forever.
#
# **Example** Two channels are enough: `full` (my data are at your place) and `free` (I have read yours, write again).
#
# **About** 10 minutes, ★★★


# %% e4
def exchange_signals(me):
    """Put to all peers and read from all peers, with signals alone."""
    for number in me.rounds:
        # >>> your code
        #: for peer in me.peers:
        #:     yield me.put(peer, number)
        #:     yield me.signal(peer, "full")
        for peer in me.peers:
            if number > 1:
                yield me.wait(peer, "free")
            yield me.put(peer, number)
            yield me.signal(peer, "full")
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.read(peer, number)
            yield me.signal(peer, "free")
        # <<<


# %% e4-check
lesson.check_signals(exchange_signals)


# %% e4-mutant-nobody-says-free
def exchange_signals(me):
    for number in me.rounds:
        for peer in me.peers:
            yield me.put(peer, number)
            yield me.signal(peer, "full")
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.read(peer, number)


# %% e4-mutant-signal-first
def exchange_signals(me):
    for number in me.rounds:
        for peer in me.peers:
            if number > 1:
                yield me.wait(peer, "free")
            yield me.signal(peer, "full")
            yield me.put(peer, number)
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.read(peer, number)
            yield me.signal(peer, "free")


# %% e4-mutant-waits-for-free-in-round-1
def exchange_signals(me):
    for number in me.rounds:
        for peer in me.peers:
            yield me.wait(peer, "free")
            yield me.put(peer, number)
            yield me.signal(peer, "full")
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.read(peer, number)
            yield me.signal(peer, "free")


# %% e4-mutant-free-before-the-read
def exchange_signals(me):
    for number in me.rounds:
        for peer in me.peers:
            if number > 1:
                yield me.wait(peer, "free")
            yield me.put(peer, number)
            yield me.signal(peer, "full")
        for peer in me.peers:
            yield me.wait(peer, "full")
            yield me.signal(peer, "free")
            yield me.read(peer, number)


# %% e4-help [markdown]
# Two edges to protect: write → read, and read → next write. One channel for each.
#
# ---
# After the put: signal `full`. Before the read: wait for `full`. After the read: signal `free`. Before the put: wait for
# `free`, but not in the first round, when nobody has read anything yet.
#
# ---
# `if number > 1: yield me.wait(peer, "free")`, put, signal `full`, for all peers; then for all peers wait `full`, read, signal `free`.
#
# ---
# **Why** Each rank waits for the peers whose data it reads and whose memory it overwrites, and for nobody else. On a GPU the
# signal also has to carry the data's visibility: release when it is set, acquire when it is read, both at *system scope*,
# because the other rank is another GPU.
#
# **Another way** A counter instead of a word: signal writes the round, wait looks for "at least this round". Nothing has to be
# emptied, and a lost wake-up is impossible. DeepEP and NCCL's symmetric kernels count.

# %% s6 [markdown]
# ## 6. The pool, and what a spill costs
#
# Making a segment needs all ranks. So a pool makes one big **arena** up front and hands out pieces.
#
# {glossary: arena, pool; spill}
#
# The review of sglang#24040, the change that this kit is about, asked: token counts vary; if a buffer is larger than the pool,
# is memory then allocated at run time? The author confirmed that this can happen, and that 4 GB are set aside at the start to
# make it rare. The reviewer also asked whether to warm up with the largest request.

# %% spills-predict
lesson.predict("spills", ...)

# %% live
from cpkit.notebook.pool_live import PoolLive

arena_mb, requests_mb = world.requests_mb()
live = PoolLive(lab, requests_mb, cp, arena_mb=arena_mb)
live

# %% live-still tags=["nbval-ignore-output"]
live.wait(done=1)
served = list(live.served)
figures.show(figures.pool_requests(served))

# %% spills-reveal
lesson.reveal("spills", sum(bool(request.spill_ms) for request in served))

# %% live-text [markdown]
# Move the slider: every arena serves the same nine requests again, on the real ranks. With the largest arena there is no spill at
# all. With the smallest, nearly every new size is one.
#
# A spill here costs file, pages and mappings. On GPUs it is `ncclMemAlloc` and a registration over all ranks.

# %% warm-text [markdown]
# ### Warm up
#
# The cure: say before the first request how many tokens may come. `warm_up` makes room for them once, and counts the
# peak allocation of the most demanding algorithm.

# %% warm
largest = world.of(8192)
lab.pool.configure(world.of(8_000_000), cp)
warm = lab.pool.warm_up(max_tokens=largest, cp_size=cp)
for tokens in (largest, largest // 8, largest // 2 + 1):
    assert lab.gather(tokens, cp_size=cp, algorithm="direct", show=False).verified
now = lab.pool.stats(cp)
print("spills during three gathers:", int((now["spills"] - warm["spills"]).sum()))
assert (now["spills"] == warm["spills"]).all(), "no gather had to grow the pool"

# %% s7 [markdown]
# ## 7. When is a block free?
#
# A pool gives a new block the lowest free address. That is the same offset everywhere, as long as all ranks have freed the same
# blocks. But Python lets go of a tensor when it likes, on each rank in its own time. Here rank 1 still holds block 1 when the
# next gather buffer is made.

# %% diverge
from cpkit_lessons.divergence import simulate_push

early = [("alloc", "old", 8), ("alloc", "kv", 4), ("free", "old", 0)]
late = [("alloc", "old", 8), ("alloc", "kv", 4)]
same = simulate_push([early, early], shard_rows=3, arena_rows=18)
print(same.explain())
found = simulate_push([early, late], shard_rows=3, arena_rows=18)
figures.show(figures.memory_map(found))

# %% diverge-words
for sentence in found.explain().split("; "):
    print(sentence)
assert found.diverged
assert not same.diverged

# %% diverge-text [markdown]
# No rank has made a mistake that it could see. The free lists of rank 0 and rank 1 are each consistent, but they are not *equal*.
# The push went to the offset that the sender computed: three rows are lost, and three rows of a block in use are
# destroyed. This is pytorch#178138, and with a captured CUDA graph sglang#34230: garbage, no error.

# %% e5-task [markdown]
# ### Exercise 5 · When is a block free?
#
# **Goal** At every meeting the ranks tell each other which blocks they have let go of: `dropped[r]` is the set of rank r. Each
# rank calls `may_free(dropped, me)` and frees what it returns. Offsets must always be equal on all ranks, no rank may lose a
# block that it still uses, and no block may be kept longer than needed.
#
# **Example** Rank 0 has let go of {1, 2}, rank 1 of {2, 3}. Only block 2 is free: `may_free([{1, 2}, {2, 3}], 0)` is {2},
# and on rank 1 it is the same.
#
# **About** 4 minutes, ★★☆


# %% e5
def may_free(dropped, me):
    """Blocks that rank `me` frees at this meeting: a set."""
    # >>> your code
    #: return dropped[me]
    return set.intersection(*dropped)
    # <<<


# %% e5-check
lesson.check_may_free(may_free)


# %% e5-mutant-anybody
def may_free(dropped, me):
    return set.union(*dropped)


# %% e5-mutant-rank-0-decides
def may_free(dropped, me):
    return dropped[0]


# %% e5-mutant-majority
def may_free(dropped, me):
    return {b for b in set.union(*dropped) if 2 * sum(b in d for d in dropped) > len(dropped)}


# %% e5-mutant-never
def may_free(dropped, me):
    return set()


# %% e5-help [markdown]
# Two things must hold: everybody frees the same, and nobody frees what somebody uses.
#
# ---
# A block is free when *every* rank has let go of it. That is an AND over ranks, and it is the same on all of them.
#
# ---
# `set.intersection(*dropped)`.
#
# ---
# **Why** A rank that keeps a tensor longer costs memory, not correctness. cpkit's pool (`memory/pool.py`) sends one bit per block at the
# meeting that every gather has anyway, and a digest of its history. A mismatch raises an error that lists each rank's allocations.
#
# **Another way** Never free: make all buffers once, by name, and reuse them. Kernels that are captured in a graph do that.
# Ordering free blocks alike is not enough while ranks free at different times: pytorch#178362 (closed) orders the blocks of
# PyTorch's allocator by a counter of allocation time instead of the address, and #190977, wrong rows after reuse, is still open.

# %% s8 [markdown]
# ## 8. Registered: buffer, group, offset
#
# Whether a gather takes the fast path depends on four facts, **on all ranks**:
#
# | fact | if it does not hold | seen in |
# |---|---|---|
# | the *buffer* is in symmetric memory | silent fallback | sglang#37337 |
# | it is registered with *this group* | silent fallback | sglang#19329 |
# | the *receive* buffer is at the *same offset* everywhere | wrong rows, no error | pytorch#178138 |
# | all GPUs of the group reach each other over *NVLink* | silent fallback | `ncclSymkAvailable` in NCCL's `sym_kernels.cc` |
#
# The offset of the send buffer is free: each rank reads its own shard through its own pointer, and only stores go to peers. A
# shard that is sent from its slice of the receive buffer (`recv + rank · shard`) has another offset on every rank, and is right.
#
# Which buffers must be registered depends on NCCL's version.

# %% recv-predict
lesson.predict("recv", ...)

# %% versions
lesson.version_table()

# %% versions-text [markdown]
# From `cpkit.memory.path`, read out of NCCL's sources at these tags (`symmetric_sched.cc`, `sym_kernels.cc`). Before 2.27 there are no
# symmetric kernels. From 2.29 on (first tag: 2.29.2) only the receive buffer counts. So "both buffers must be
# registered" (sglang#37337) is right for torch 2.11, and out of date two versions later. The receive buffer alone has two limits:
# over several nodes it rules out the kernels that cross them (GIN), and where NCCL selects its kernel for small sizes (LL) it may
# still fall back. That kernel stages in NCCL's own memory, so a registered *send* buffer alone may select it too (seen with 2.30.7
# and 64 KiB per rank). Our own ranks push: they need the receive buffer, and a symmetric send buffer only saves the copy that pads.
#
# The last column is the race of section 4: from 2.28.0 to 2.30.4 symmetric kernels do not wait for the kernel before them
# (sglang#37768). `python -m cpkit doctor` warns of the same versions. The race is one of symmetric kernels only.
#
# What NCCL did in the end is in its log (`NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=TUNING`): `AllGather [Symmetric]` or `Algo RING`. In a
# profile, symmetric kernels are called `ncclSymkDevKernel_…`. And the version that counts is that of the *loaded* library
# (`ncclGetVersion`), not the one that torch was compiled with.

# %% explain
algorithms = ["padded", "padded_symm_recv", "padded_symm", "direct"]
reports = [lab.explain(world.of(4096), cp, algorithm=name).iloc[0] for name in algorithms]
pd.DataFrame(reports, index=algorithms)[["path", "reason"]]

# %% e6-task [markdown]
# ### Exercise 6 · The fast path's rule
#
# **Goal** Write `fast_path`: what this all-gather gets from NCCL.
#
# - `"fallback"`: no symmetric kernel that stores every row at its right offset;
# - `"racy"`: such a kernel, but of a version that does not wait for the kernel before it;
# - `"sound"`: such a kernel, of a version that waits.
#
# `version` is a tuple, `group` the name of the gather's group, all GPUs reach each other over NVLink. `send[r]` and `recv[r]` say
# where rank r's buffers are: `None` (ordinary memory) or `(group, offset)`.
#
# **Example** Two ranks, both `recv` at `("attn_cp", 4096)`, both `send` `None`, group `"attn_cp"`: `"fallback"` for `(2, 28, 9)`,
# `"racy"` for `(2, 29, 7)`, `"sound"` for `(2, 30, 7)`.
#
# **About** 8 minutes, ★★☆


# %% e6
def fast_path(version, group, send, recv):
    """One of "fallback", "racy", "sound"."""

    # >>> your code
    #: return "sound" if None not in send and None not in recv else "fallback"
    def registered(buffers):
        return all(buffer is not None and buffer[0] == group for buffer in buffers)

    symmetric_recv = registered(recv) and len(set(recv)) == 1
    enough = symmetric_recv and (version >= (2, 29) or registered(send))
    if version < (2, 27) or not enough:
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"
    # <<<


# %% e6-check
lesson.check_fast_path(fast_path)


# %% e6-mutant-always-both
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if version < (2, 27) or not (all(good) and len(set(recv)) == 1):
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"


# %% e6-mutant-any-group
def fast_path(version, group, send, recv):
    good = [None not in b for b in (send, recv)]
    if version < (2, 27) or not (
        good[1] and len(set(recv)) == 1 and (good[0] or version >= (2, 29))
    ):
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"


# %% e6-mutant-send-offsets-count-too
def fast_path(version, group, send, recv):
    good = [len(set(b)) == 1 and b[0] is not None and b[0][0] == group for b in (send, recv)]
    if version < (2, 27) or not (good[1] and (good[0] or version >= (2, 29))):
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"


# %% e6-mutant-only-my-rank
def fast_path(version, group, send, recv):
    good = [b[0] is not None and b[0][0] == group for b in (send, recv)]
    if version < (2, 27) or not (good[1] and (good[0] or version >= (2, 29))):
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"


# %% e6-mutant-offsets-do-not-matter
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if version < (2, 27) or not (good[1] and (good[0] or version >= (2, 29))):
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"


# %% e6-mutant-send-is-what-counts
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if version < (2, 27) or not (
        good[0] and len(set(recv)) == 1 and (good[1] or version >= (2, 29))
    ):
        return "fallback"
    return "racy" if (2, 28) <= version <= (2, 30, 4) else "sound"


# %% e6-mutant-every-version-is-sound
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if version < (2, 27) or not (
        good[1] and len(set(recv)) == 1 and (good[0] or version >= (2, 29))
    ):
        return "fallback"
    return "sound"


# %% e6-mutant-the-race-ended-with-2-29
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if version < (2, 27) or not (
        good[1] and len(set(recv)) == 1 and (good[0] or version >= (2, 29))
    ):
        return "fallback"
    return "racy" if (2, 28) <= version < (2, 29) else "sound"


# %% e6-mutant-old-versions-are-racy-too
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if version < (2, 27) or not (
        good[1] and len(set(recv)) == 1 and (good[0] or version >= (2, 29))
    ):
        return "fallback"
    return "racy" if version <= (2, 30, 4) else "sound"


# %% e6-mutant-the-ring-is-racy-too
def fast_path(version, group, send, recv):
    good = [all(p is not None and p[0] == group for p in b) for b in (send, recv)]
    if (2, 28) <= version <= (2, 30, 4):
        return "racy"
    enough = good[1] and len(set(recv)) == 1 and (good[0] or version >= (2, 29))
    return "sound" if version >= (2, 27) and enough else "fallback"


# %% e6-help [markdown]
# First write what "registered" means for *one* buffer over all ranks. Then ask which buffers need it, and which need one offset.
# The race comes last: it concerns only calls that do not fall back.
#
# ---
# For one buffer: no rank has `None`, and all name the gather's group. Only `recv` needs one offset as well. Tuples compare as
# you want: `(2, 28, 9) < (2, 29)`.
#
# ---
# `all(b is not None and b[0] == group for b in buffers)`; `recv` also needs `len(set(recv)) == 1`. From 2.29 on `recv` alone
# is enough, before that both are needed, and before 2.27 nothing helps. What is left is racy if
# `(2, 28) <= version <= (2, 30, 4)`.
#
# ---
# **Why** NCCL itself does *not* compare offsets. On two H100s with NCCL 2.28.9 and a receive buffer at another offset on each rank,
# shards of 64 KiB were right, because the kernel for small sizes goes through a staging buffer. Shards of 2 MiB were wrong on
# every rank, without an error. cpkit's ranks exchange where their buffers are before every gather (`locate.py`, `path.py`), and
# give NCCL an ordinary copy of such a buffer: the path is `fallback`, with the reason.
#
# **Another way** Send from your own slice of the receive buffer. One registration then serves both, on every version, and the
# copy that pads is gone as well: sglang#37337's remedy for `interleave`.

# %% recv-reveal
from cpkit.memory.path import BufferLocation, BufferPair, decide

send = BufferLocation(other="ordinary memory", fault="unregistered")
places = [BufferPair(send, BufferLocation(0, 4096))] * 2
path = decide(places, 0, "nccl 2.28.9").path
lesson.reveal("recv", path)

# %% s9 [markdown]
# ## 9. Failure lab
#
# Now break it on purpose. Each case starts two ranks of its own, lets rank 1 make one mistake, and ends them; they wait for each
# other 1.5 s at most, and your workers above know nothing of it. Before each run: **what will the ranks see?**
#
# - `error at once`: a sentence on all ranks;
# - `error after the deadline`: somebody waits in vain;
# - `fast path missed`: no error, every row right, and on some transport not the fast path;
# - `silently wrong`: no error, and rows that are wrong.

# %% lab
from cpkit_lessons.failure_lab import CASES, inject_fault

cards = {}


def run(case):
    """Run one case, keep its post-mortem, and show it."""
    cards[case] = inject_fault(case)
    return cards[case]


# %% skips-text [markdown]
# ### One rank skips the rendezvous
#
# Rank 1 takes a branch in which it makes no symmetric memory: no tokens for it in this batch, say.

# %% skips-predict
lesson.predict("skips_the_rendezvous", ...)

# %% skips tags=["nbval-ignore-output"]
run("skips_the_rendezvous")

# %% skips-reveal
lesson.reveal("skips_the_rendezvous", cards["skips_the_rendezvous"].symptom)

# %% sizes-text [markdown]
# ### Sizes differ
#
# A scratch buffer is sized by this rank's own rows; rank 1 has one row more. Then all gather, with equal shapes.

# %% sizes-predict
lesson.predict("sizes_differ", ...)

# %% sizes tags=["nbval-ignore-output"]
run("sizes_differ")

# %% sizes-reveal
lesson.reveal("sizes_differ", cards["sizes_differ"].symptom)

# %% receive-text [markdown]
# ### Receive-only registration
#
# The seed as merged: output in symmetric memory, shard in ordinary memory. Our ranks really gather; for NCCL's versions the same
# buffers are put to the rule.

# %% receive-predict
lesson.predict("receive_only", ...)

# %% receive tags=["nbval-ignore-output"]
run("receive_only")

# %% receive-reveal
lesson.reveal("receive_only", cards["receive_only"].symptom)

# %% group-text [markdown]
# ### The wrong group
#
# Both buffers are symmetric, but in the pool of another group.

# %% group-predict
lesson.predict("wrong_group", ...)

# %% group tags=["nbval-ignore-output"]
run("wrong_group")

# %% group-reveal
lesson.reveal("wrong_group", cards["wrong_group"].symptom)

# %% lists-text [markdown]
# ### Divergent free lists
#
# Section 7, on real shared memory: an allocator without agreement, and rank 1 has kept a block that rank 0 has freed.

# %% lists-predict
lesson.predict("divergent_free_lists", ...)

# %% lists tags=["nbval-ignore-output"]
run("divergent_free_lists")

# %% lists-reveal
lesson.reveal("divergent_free_lists", cards["divergent_free_lists"].symptom)

# %% full-text [markdown]
# ### Shared memory is full
#
# The arena is larger than what is left of `/dev/shm`. In containers that is often 64 MB in all.

# %% full-predict
lesson.predict("shared_memory_is_full", ...)

# %% full tags=["nbval-ignore-output"]
run("shared_memory_is_full")

# %% full-reveal
lesson.reveal("shared_memory_is_full", cards["shared_memory_is_full"].symptom)

# %% dies-text [markdown]
# ### A rank dies
#
# Rank 1 is killed before it comes to the gather, as the kernel does when memory runs out.

# %% dies-predict
lesson.predict("a_rank_dies", ...)

# %% dies tags=["nbval-ignore-output"]
run("a_rank_dies")

# %% dies-reveal
lesson.reveal("a_rank_dies", cards["a_rank_dies"].symptom)

# %% cards-text [markdown]
# ### All post-mortems side by side
#
# Four symptoms, seven causes: the symptom alone does not tell you. What does?

# %% cards
assert list(cards) == list(CASES)
symptoms = {case: card.symptom for case, card in cards.items()}
exits = {case: ", ".join(rank.ended for rank in card.ranks) for case, card in cards.items()}
pd.DataFrame({"symptom": symptoms, "rank 0, rank 1": exits})

# %% e7-task [markdown]
# ### Exercise 7 · From post-mortem to cause
#
# **Goal** Write `cause`: the name of what went wrong, one of `CASES`, from what the ranks saw. Each has `rank`, `exit_code`
# (negative: killed by that signal), `error` (the type's name, or ""), `message`, `waited_s`, `paths` (transport to
# path), `reason` (why that path, in words), `wrong` (the first wrong row, or ""). The ranks come in any order; to look at
# one: `cards["wrong_group"].ranks[0]`.
#
# **Example** One rank says `BarrierTimeout`, the other has exit code −9: `"a_rank_dies"`.
#
# **About** 8 minutes, ★★☆


# %% e7
def cause(ranks):
    """One of CASES."""
    # >>> your code
    #: return "skips_the_rendezvous"
    said = " ".join(rank.message + rank.reason for rank in ranks)
    if any(rank.error == "BarrierTimeout" for rank in ranks):
        killed = any(rank.exit_code < 0 for rank in ranks)
        return "a_rank_dies" if killed else "skips_the_rendezvous"
    if any(rank.error for rank in ranks):
        return "shared_memory_is_full" if "is full" in said else "sizes_differ"
    if any(rank.wrong for rank in ranks):
        return "divergent_free_lists"
    return "wrong_group" if "another group" in said else "receive_only"
    # <<<


# %% e7-check tags=["nbval-ignore-output"]
lesson.check_cause(cause, cards)


# %% e7-mutant-blames-the-first-rank
def cause(ranks):
    if ranks[0].exit_code < 0:
        return "a_rank_dies"
    if ranks[0].error == "BarrierTimeout":
        return "skips_the_rendezvous"
    if ranks[0].error:
        return "shared_memory_is_full" if "is full" in ranks[0].message else "sizes_differ"
    if ranks[0].wrong:
        return "divergent_free_lists"
    return "wrong_group" if "another group" in ranks[0].reason else "receive_only"


# %% e7-mutant-no-error-no-problem
def cause(ranks):
    for rank in ranks:
        if rank.exit_code < 0:
            return "a_rank_dies"
        if "is full" in rank.message:
            return "shared_memory_is_full"
        if rank.error == "SymmetricMemoryError":
            return "sizes_differ"
    return "receive_only"


# %% e7-mutant-a-timeout-is-a-death
def cause(ranks):
    said = " ".join(rank.message + rank.reason for rank in ranks)
    if any(rank.error == "BarrierTimeout" for rank in ranks):
        return "a_rank_dies"
    if any(rank.error for rank in ranks):
        return "shared_memory_is_full" if "is full" in said else "sizes_differ"
    if any(rank.wrong for rank in ranks):
        return "divergent_free_lists"
    return "wrong_group" if "another group" in said else "receive_only"


# %% e7-help [markdown]
# Sort by evidence: first what only a dead process leaves, then errors, then wrong rows, then paths.
#
# ---
# A timeout has two causes; the *other* rank's exit code tells them apart. An error at once has two; the words tell. No error
# has three: wrong rows, or one of two reasons for the path.
#
# ---
# `any(r.error == "BarrierTimeout" …)`, then `any(r.exit_code < 0 …)`; `"is full" in said`; `any(r.wrong …)`;
# `"another group" in reason`.
#
# ---
# **Why** The rank that complains is seldom the one that is to blame. A post-mortem needs *all* ranks: who waited, for whom, and
# how each one ended.
#
# **Another way** A table of (symptom, detail) to cause. It is shorter, and it shows that two causes can share a symptom only as long
# as some detail differs: if none does, your logs say too little.

# %% s10 [markdown]
# ## 10. Your own pull gather
#
# All of it together: a gather of uneven shards, straight into token order, that survives any schedule. Each rank stores its shard
# in its symmetric buffer, and *loads* from its peers.

# %% e8-task [markdown]
# ### Exercise 8 · A pull gather
#
# **Goal** Write one round of `pull_gather`. `shard` are this rank's rows, `out` is the whole result in token order (poisoned),
# `tokens[r]` says which tokens rank r holds, in its order. `yield me.store(shard)` copies rows into my symmetric buffer;
# `yield me.load(peer, count)` returns the first `count` rows of a peer's buffer. The next round uses the same buffers.
#
# **Example** 2 ranks, `tokens` = [[0, 3], [1, 2]]. On both ranks `out[[0, 3]]` becomes rank 0's two rows, `out[[1, 2]]` rank 1's.
#
# **About** 12 minutes, ★★★


# %% e8
def pull_gather(me, shard, out, tokens):
    """Fill `out` with everybody's rows, in token order."""
    # >>> your code
    #: yield me.store(shard)
    #: out[tokens[me.rank]] = yield me.load(me.rank, len(shard))
    yield me.store(shard)
    yield me.barrier()
    for step in range(me.size):
        peer = (me.rank + step) % me.size
        out[tokens[peer]] = yield me.load(peer, len(tokens[peer]))
    yield me.barrier()
    # <<<


# %% e8-check
lesson.check_pull_gather(pull_gather)


# %% e8-mutant-no-second-barrier
def pull_gather(me, shard, out, tokens):
    yield me.store(shard)
    yield me.barrier()
    for peer in me.all_ranks:
        out[tokens[peer]] = yield me.load(peer, len(tokens[peer]))


# %% e8-mutant-no-first-barrier
def pull_gather(me, shard, out, tokens):
    yield me.store(shard)
    for peer in me.all_ranks:
        rows = yield me.load(peer, len(tokens[peer]))
        if rows is not None:
            out[tokens[peer]] = rows
    yield me.barrier()


# %% e8-mutant-rank-order
def pull_gather(me, shard, out, tokens):
    yield me.store(shard)
    yield me.barrier()
    first = 0
    for peer in me.all_ranks:
        count = len(tokens[peer])
        out[first : first + count] = yield me.load(peer, count)
        first += count
    yield me.barrier()


# %% e8-mutant-as-long-as-mine
def pull_gather(me, shard, out, tokens):
    yield me.store(shard)
    yield me.barrier()
    for peer in me.all_ranks:
        count = min(len(shard), len(tokens[peer]))
        out[tokens[peer][:count]] = yield me.load(peer, count)
    yield me.barrier()


# %% e8-mutant-barrier-for-all-but-the-last
def pull_gather(me, shard, out, tokens):
    yield me.store(shard)
    yield me.barrier()
    for peer in me.all_ranks:
        out[tokens[peer]] = yield me.load(peer, len(tokens[peer]))
    if me.rank + 1 < me.size:
        yield me.barrier()


# %% e8-help [markdown]
# Two edges again: store → load, and load → next store. Then: which place in `out` has a peer's i-th row?
#
# ---
# Store, barrier, loads, barrier. `out[tokens[peer]] = rows` puts each row at its token: no padding, no strip, no reorder.
#
# ---
# `for step in range(me.size): peer = (me.rank + step) % me.size`, then load `len(tokens[peer])` rows. The score shows what the
# rotation is for.
#
# ---
# **Why** If all ranks begin with rank 0, one memory serves everybody at once while the others idle. Rotated, each rank reads another
# one in every step, as in cpkit's `pull_shards`. The low contention of PyTorch's `_low_contention_all_gather` is another one: with
# *computation* that runs at the same time, because it copies with copy engines instead of multiprocessors (pytorch#130583).
#
# **Another way** Push: `put` your rows at their tokens in every peer's *output*. Then `out` must be symmetric instead of the shard, and
# the exit barrier says when it is complete. That is `algorithm="direct"`; notebook 3 measures it.

# %% real-text [markdown]
# And the real one, on your workers, in both directions: every byte is checked.

# %% real
tokens = world.of(4096) + 1
on = lab.gather(tokens, cp_size=cp, algorithm="direct", show=False)
off = lab.gather(tokens, cp_size=cp, algorithm="direct", symmetric=False, show=False)
assert on.verified
assert off.verified, "both are right; only the path differs"
assert (on.path, off.path) == ("symmetric", "fallback")
print("symmetric memory on: ", on.path)
print("symmetric memory off:", off.path, "|", off.path_reason)

# %% progress
lesson.progress()

# %% end [markdown]
# ## What to remember
#
# - Symmetric means: the same offset on every rank. Pointers differ.
# - Two waits: before you read what peers wrote, and before anybody writes there again. One round never shows the second.
# - A spill is a collective at run time. Warm up with the largest batch you will see.
# - A block is free when *all* ranks have let go of it. Books that differ give wrong rows, not errors.
# - Registered = buffer + group + offset, and which buffers is a matter of the version. It counts only with NVLink between all
#   GPUs, and some versions' kernels have a race. Always ask for the path, and for the version.
# - The rank that complains is seldom the one to blame.
#
# **You can now read**
#
# - SGLang `pynccl_allocator.py` (`use_symmetric_memory`: registration hidden in `__exit__`), `cp/zigzag.py`
#   (`_all_gather_reorganized`: receive side only), and the threads #24040, #37337, #19329, #36943;
# - PyTorch `torch/distributed/_symmetric_memory/__init__.py` (`rendezvous`, `put_signal`, `_low_contention_all_gather`);
# - NCCL `scheduler/symmetric_sched.cc`, `sym_kernels.cc`;
# - cpkit `sync/barrier.py`, and in `memory/`: `allocator.py`, `pool.py`, `path.py`.
#
# **An open problem** The simulator's memory is sequentially consistent: a step is seen by all at once. A GPU's is not. Extend
# `simulate.py` with a store buffer for each rank, and find the smallest program that passes here and fails there.
#
# Next: `03_allgather_perf.ipynb`.
