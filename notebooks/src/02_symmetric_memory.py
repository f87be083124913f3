# %% title [markdown]
# # 2 · Symmetric memory
#
# (The saved outputs contain the answers: choose *Edit → Clear Outputs of All Cells* before you begin.)
#
# A collective such as all-gather hides how bytes travel. With *symmetric memory*, a rank writes into the memory of a
# peer as if that memory were its own. That is fast, and serving engines use it for that reason. But the safety of the
# collective is gone: no rank waits unless you tell it to, and no error reports a missing wait.
#
# Run a cell with `lesson.predict` to see its question, then put your answer in place of `...` and run it again.
#
# **Time** 90 minutes. **Needs** Linux on x86-64, and no GPU: without one, the ranks use POSIX shared memory. The cells
# of sections 5, 9 and 11 that start two ranks of their own start them on the CPU. **Prerequisites** notebook 1.
#
# After this notebook you can
# 1. say what is symmetric about symmetric memory, and compute the pointer of a peer;
# 2. place barriers or signals so that a loop is right in every order of events, and search all orders of a few ranks;
# 3. store rows straight in the paged cache of a peer;
# 4. size a pool so that it never has to grow while an engine serves requests;
# 5. decide, from four facts and a version number, whether a gather takes the fast path, and whether that path is safe;
# 6. find the cause of a failure from what the ranks observed.
#
# {glossary: symmetric memory; segment; put, get; barrier; stale (read after write); ahead (write after read)}

# %% connect tags=["nbval-ignore-output"]
import cpkit
from cpkit_lessons import symmetric as lesson

lesson.explain_missing_names()  # the error for an undefined name then says what to run first
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
# A kernel that writes into a peer's memory needs an address. Which address? Every rank allocates the same buffer in a
# *segment* of its own: on the CPU a file in shared memory, on a GPU an allocation. Every rank then maps *all* segments,
# and can write into each of them as into ordinary memory. So cp ranks hold cp² mappings (4 ranks hold 16). The *offset*
# of a buffer is its distance in bytes from the start of its segment.

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
assert same_offset, "otherwise the memory is not symmetric"

# %% address-text [markdown]
# Did your addresses happen to be equal? They can be: on one GPU, four processes all received the same address. That is
# an accident. So never send a pointer to a peer. Send an offset: the peer adds it to the address at which *it* has
# mapped the segment.
#
# In PyTorch, the ranks map each other's buffers in a *rendezvous*. Each rank receives a *handle* with the list
# `buffer_ptrs`: for every rank, the address at which *this process* has mapped that rank's buffer. After that the
# buffer is *registered*: every rank can compute the address of each peer's buffer.

# %% e1-task [markdown]
# ### Exercise 1 · A peer's pointer
#
# **Goal** Write `peer_pointer`. `pointer` is an address in the segment of rank `me`. `bases[r]` is the address where
# **this** process has mapped the segment of rank r. Return the address, in this process, of the same byte in the
# segment of `peer`.
#
# **Example** Let `bases` be [1000, 5000]. On rank 0, address 1064 is offset 64. The same byte of rank 1 is at address
# 5064, so `peer_pointer(1064, 0, 1, [1000, 5000])` is 5064.
#
# **About** 3 minutes, ★☆☆


# %% e1
def peer_pointer(pointer, me, peer, bases):
    """Return the address of the same byte in the segment of `peer`."""
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
# What do my buffer and the peer's buffer have in common? It is not the address.
#
# ---
# Address minus base is the offset, and base plus offset is an address.
#
# ---
# One line is enough: the base of the peer, plus my pointer, minus my base.
#
# ---
# **Why** This line is the core of symmetric memory. A kernel that stores to a peer does this calculation, or an
# equivalent one, once per peer, often from a table of bases that was made in the rendezvous.
#
# **Another way** Store one difference per peer, `bases[peer] - bases[me]`, and add it. The device code of NVSHMEM loads
# the base of the peer from a table, as you did. NCCL maps the segments of all ranks at a fixed distance from each other
# (`lsaFlatBase`, `stride4G`), so its difference is `(peer - me) · stride`.

# %% s2 [markdown]
# ## 2. Put and get
#
# Now that a rank can address its peers, it can move rows in two directions. What must each rank wait for? In section 1,
# `lab.put(cp, rounds=1)` ran one round: each rank *put* a stamp into its own slot of the memory of every rank, itself
# included, and then read its own memory. A stamp contains the rank that wrote it, and the round.

# %% who
assert (put.writers == range(cp)).all(), "slot w of every rank was written by rank w"
assert (put.matrix == 1).all(), "and all of it in round 1"
figures.show(figures.who_wrote_where(put.stamps, rounds=1))

# %% get-text [markdown]
# A *put* writes into the memory of a peer, and a *get* reads from it. They differ in what each rank waits for:
#
# | | data moves | before the read | before the next write to the same memory |
# |---|---|---|---|
# | put (push) | from me to the peer | the peer waits until my data has arrived | I wait until the peer has read it |
# | get (pull) | from the peer to me | I wait until the peer has written its data | the peer waits until I have read it |
#
# Both directions need both waits.

# %% s3 [markdown]
# ## 3. Remove the barriers
#
# How bad is it to forget a wait? First run the correct loop, for 1000 rounds on the real ranks. In each round, all
# ranks put, wait at a barrier, read, and wait at a second barrier.

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
assert wrong > 0, "without a barrier, some reads are too early or too late"

# %% stale-reveal
classes = {"under 1 %": wrong < 0.01, "1 to 10 %": 0.01 <= wrong <= 0.1, "over 10 %": wrong > 0.1}
lesson.reveal("stale", max(classes, key=classes.get))

# %% names-text [markdown]
# The round in the stamp distinguishes two failures:
#
# - **stale** (a read-after-write fault): the reader was early. It read before the writer had written.
# - **ahead** (a write-after-read fault): the writer was early. It had already begun a later round. (The workers run the
#   rounds in two halves of 500, and meet in between. So `read round 500` says that a writer had finished its half.)
#
# Now imagine a test that gathers the same values in every round. It would accept all wrong reads, except those of
# memory that was never written.

# %% s4 [markdown]
# ## 4. Every possible order
#
# A thousand rounds on one machine show what *did* happen. A serving engine runs billions of rounds, so you need to know
# what *can* happen. Here is the loop without a barrier as a small program. Each `yield` is one step that the peers can
# observe. Between two steps of one rank, the other ranks may take any number of steps.
#
# ```python
# def no_barrier(me):
#     for number in me.rounds:
#         for peer in me.all_ranks:           # rank 0 first; I am one of them
#             yield me.put(peer, number)      # write my stamp of this round into my slot there
#         for writer in me.all_ranks:
#             yield me.read(writer, number)   # must find the stamp of this round
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
print(f"{shortest.states} states searched")
print(shortest.failure)
figures.show(figures.schedule_timeline(shortest.failure))

# %% smallest-reveal
lesson.reveal("smallest", len(shortest.failure.events))

# %% one-text [markdown]
# Read the figure from left to right. A column is a step, a row is a rank, and an arrow is a write into the memory of a
# peer. Rank 1 reads before rank 0 has taken any step.
#
# So put a barrier between the puts and the reads. Is one barrier enough?

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
# **Goal** Complete `exchange`, so that the ranks read correct data in every order. Use `yield me.barrier()`; a step
# without `yield` has no effect. The check searches *all* orders of 2 and of 3 ranks over a few rounds, and random
# orders of 5 ranks.
#
# **Example** For one round of 2 ranks, `put 0, put 1, barrier, read 0, read 1` passes. For two rounds it fails, as the
# figure above shows.
#
# **About** 4 minutes, ★☆☆


# %% e2
def exchange(me):
    """Put and read in every round, so that every read finds the stamp of its own round."""
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
# Look at the last two steps of the figure above. What should the writer have waited for?
#
# ---
# You need one wait so that all ranks have written before any rank reads, and one so that all ranks have read before any
# rank writes again.
#
# ---
# Put `yield me.barrier()` before the loop of reads, and again after it.
#
# ---
# **Why** The first barrier orders each write before its read. The second barrier orders each read before the next
# write. Every call of `all_gather_kv` with `direct` contains both waits: one at its start, before any row is stored,
# and one at its end, before any row is read. On the CPU, the wait at the start is an agreement, and the wait at the end
# is a barrier. On GPUs, both are barriers that run on the stream, like kernels, and the agreement comes before them.
# PyTorch's `_low_contention_all_gather` has them too.
#
# **Another way** Use two buffers in turn. Round n+2 overwrites the data of round n, and no rank passes the barrier of
# round n+1 before all ranks have read that data. So one barrier per round is enough, at the price of twice the memory.
# A *plan* of cpkit (section 8 of notebook 1) does this with two outputs, and cpkit's barrier (`sync/barrier.py`) with
# two message slots.

# %% e3-task [markdown]
# ### Exercise 3 · Make it fail
#
# **Goal** Break `one_barrier` by hand. In the figure before exercise 2, a read of rank 1 is *ahead*. Write an order of
# steps in which a read of **rank 0** is ahead. Each rank takes 5 steps per round: put to 0, put to 1, barrier, read 0,
# read 1. The order may end with the wrong read.
#
# **Example** In `[0, 0, 0, 1, 1, 1]`, rank 0 puts twice and arrives at the barrier, and then rank 1 does the same. From
# here on all reads can still be right.
#
# **About** 5 minutes, ★★☆

# %% e3
# The rank that takes each step: 0 or 1.
# >>> your code
#: order = [0, 0, 0, 1, 1, 1]
order = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
# <<<

# %% e3-check
lesson.check_order(order)

# %% e3-mutant-in-turns
order = [0, 1] * 10

# %% e3-mutant-through-the-barrier
order = [0] * 10

# %% e3-mutant-one-read-too-few
order = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]

# %% e3-mutant-the-figure
order = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]

# %% e3-help [markdown]
# After the first six steps, both ranks have passed the barrier. Which rank must be slow now, and which one fast?
#
# ---
# Let rank 1 read both slots, and continue with round 2. Its put to rank 0 then overwrites what rank 0 has not read yet.
#
# ---
# `[0, 0, 0, 1, 1, 1]`, then rank 1 three times (two reads and its put to rank 0), then rank 0 twice. Its first read is
# of its own slot, which is right.
#
# ---
# **Why** You have just played the role of a scheduler, a slow core or a page fault. In GPU kernels the same happens
# when one thread block starts late.
#
# Not every race is between ranks. In NCCL 2.28.0 to 2.30.4, a *symmetric kernel* (one that stores straight into the
# memory of the peers, section 8) can read its input before the previous kernel on the *same* GPU has written it,
# because a wait between the two is missing. No barrier between ranks prevents that. In a test of SGLang that served one
# request at a time from CUDA graphs (kernels that are recorded once and then launched together), the race reduced the
# fraction of right answers from 0.575 to 0.100 (sglang#37768).
#
# **Another way** Let rank 1 also put to itself before rank 0 reads. The order has one step more, and fails in the same
# way.

# %% s5 [markdown]
# ## 5. Signals instead of barriers
#
# A barrier waits for all ranks, so one late rank delays all the others. Often a rank needs the data of *one* peer only.
# Serving engines then use a **signal** instead: one word in the memory of a peer.
#
# {glossary: signal}
#
# - `yield me.signal(peer)` sets my word at the peer. If the word is still set, it first waits until the peer has
#   cleared it.
# - `yield me.wait(peer)` waits until the word of that peer is set here, and clears it.
#
# These are the rules of `put_signal` and `wait_signal` on PyTorch's handle (section 1). (PyTorch also has module-level
# functions of these names. They work with the NCCL backend only, and `put_signal` then moves data too.) A second
# argument of `me.signal` and `me.wait`, the *channel* (default: `"full"`), selects one of several words.

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
print("with signals: ", held, "of 7 other ranks cannot finish round 1 without rank 3")
print("with barriers:", lesson.blocked_by(lesson.one_barrier, size=8, slow=3), "of 7")

# %% held-reveal
lesson.reveal("held", held)

# %% ring-fails
overrun = smallest_failure(ring, 2, 2)
figures.show(figures.schedule_timeline(overrun.failure))

# %% ring-text [markdown]
# The ring has the same gap as one barrier: `full` says that the data has arrived. No signal says that it has been
# *read*, so the next put can overwrite it.

# %% e4-task [markdown]
# ### Exercise 4 · Signals instead of barriers
#
# **Goal** Write the loop of exercise 2 without a barrier. Every rank puts to every **other** rank (`me.peers`), and
# then reads, in its own memory, what the others have put there. No read may be wrong in any order, and no rank may wait
# forever.
#
# **Example** Two channels are enough: `full` (my data has arrived at your rank) and `free` (I have read your data, you
# may write again).
#
# **About** 10 minutes, ★★★


# %% e4
def exchange_signals(me):
    """Put to all peers and read from all peers, with signals only."""
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


# %% e4-mutant-no-signal-free
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
# Two orders must hold: each write comes before its read, and each read comes before the next write. Use one channel for
# each.
#
# ---
# After the put, signal `full`. Before the read, wait for `full`. After the read, signal `free`. Before the put, wait
# for `free`, except in the first round, when no rank has read anything yet.
#
# ---
# For all peers: `if number > 1: yield me.wait(peer, "free")`, then put, then signal `full`. Then for all peers: wait
# for `full`, read, signal `free`.
#
# ---
# **Why** Each rank waits only for the peers whose data it reads and whose memory it overwrites. On a GPU, the signal
# must also make the data visible: it is set with *release* and read with *acquire* semantics, both at *system scope*,
# because the other rank may run on another GPU. (Release: whoever sees the signal also sees all earlier stores.
# Acquire: no later read happens before it. System scope: this holds for all GPUs and the CPU.)
#
# **Another way** Use a counter instead of a flag: a signal writes the round, and a wait looks for "at least this
# round". No word has to be cleared, so a signal never waits for the peer. DeepEP, DeepSeek's library for expert
# parallelism, and NCCL's symmetric kernels count in this way.

# %% handover-text [markdown]
# ### The same signals on real ranks
#
# The simulator has searched the orders of a few ranks over a few rounds. What does such a program look like on real
# ranks? `cpkit.symm` has `put_signal(group, peer)` and `wait_signal(group, peer)`, with the rules of PyTorch's handle.
# They have no channels: each rank has one word at each peer. That is enough here. The program below also uses two
# functions of section 6's pool: tensors made inside `use_symmetric_memory(group)` are in the group's symmetric memory,
# and `peer_view(tensor, peer)` is the same tensor in the memory of a peer. The first signal of a round means that the
# number has arrived, and the second that it has been read.
#
# Signals fit wherever one rank needs the data of one other rank: for example to pass activations to the next stage of a
# pipeline, or to fetch the KV cache of a request from the rank that computed it.


# %% handover
def hand_over(group):
    import torch
    from cpkit.symm import put_signal, symmetric_pool, use_symmetric_memory, wait_signal

    with use_symmetric_memory(group):
        inbox = torch.zeros(1, dtype=torch.int64)
    group.barrier()  # without it, a late rank would erase the first number with its zeros
    peer, found = 1 - group.rank, []
    at_peer = symmetric_pool(group).peer_view(inbox, peer)
    for number in range(1, 1001):
        at_peer[0] = number
        put_signal(group, peer), wait_signal(group, peer)  # both numbers have arrived
        found.append(int(inbox[0]))
        put_signal(group, peer), wait_signal(group, peer)  # both numbers have been read
    return found


# %% handover-run
from cpkit_lessons.own_ranks import in_ranks

numbers = in_ranks(hand_over, 2)
assert numbers == [list(range(1, 1001))] * 2, "every number was read once, and none is stale"
print("each of 2 ranks read 1000 numbers, all of them right")

# %% s6 [markdown]
# ## 6. The pool, and the cost of a spill
#
# What does it cost to get a symmetric buffer for each batch? A new segment requires work on all ranks at the same time.
# So a pool registers one large **arena** at startup, and divides it among the buffers.
#
# {glossary: arena, pool; spill}
#
# In the review of sglang#24040, the change that moved the receive buffer into symmetric memory, a reviewer noted that
# token counts vary. The reviewer asked whether memory is therefore allocated at run time when a buffer is larger than
# the pool. The author confirmed that this can happen, and that 4 GB is reserved at startup to make it rare. The
# reviewer also asked whether the engine should warm up with the largest request.

# %% spills-predict
lesson.predict("spills", ...)

# %% live
from cpkit_lessons.pool_live import PoolLive

arena_mb, requests_mb = world.requests_mb()  # smaller where memory is short
live = PoolLive(lab, requests_mb, cp, arena_mb=arena_mb)
live

# %% live-still tags=["nbval-ignore-output"]
live.wait(done=1)
served = list(live.served)
figures.show(figures.pool_requests(served))

# %% spills-reveal
lesson.reveal("spills", sum(bool(request.spill_ms) for request in served))

# %% live-text [markdown]
# Move the slider. For every size of the arena, the real ranks serve the same nine requests again. With the largest
# arena, no request spills. With the smallest, the most requests spill.
#
# On the CPU, a spill creates a file, its pages and its mappings on every rank. On GPUs, every rank allocates memory (in
# SGLang with `ncclMemAlloc`), and all ranks register it.

# %% warm-text [markdown]
# ### Warm up
#
# How do you prevent spills? Tell the pool before the first request how many tokens a batch can have. `warm_up` then
# makes room for them once. It reserves twice the peak allocation of the most demanding algorithm: the result of a call
# is often still in use when the next call allocates its buffers, so the buffers of two calls can exist at the same
# time.

# %% warm
largest = world.of(8192)  # tokens, or fewer where memory is short
lab.pool.configure(world.of(8_000_000), cp)
warm = lab.pool.warm_up(max_tokens=largest, cp_size=cp)
for tokens in (largest, largest // 8, largest // 2 + 1):
    assert lab.gather(tokens, cp_size=cp, algorithm="direct", show=False).verified
now = lab.pool.stats(cp)
print("spills during three gathers:", int((now["spills"] - warm["spills"]).sum()))
assert (now["spills"] == warm["spills"]).all(), "no gather made the pool grow"

# %% s7 [markdown]
# ## 7. When is a block free?
#
# A pool places each new *block* (the memory of one buffer, not a block of zigzag) at the lowest free offset of its
# *free list*, which is the list of its unused ranges. That offset is equal on all ranks, as long as all ranks have
# freed the same blocks. But Python frees a tensor when the last reference to it goes away, which can happen at a
# different time on each rank. In this example, rank 1 still holds `old` when the receive buffer `recv` is allocated.
# `simulate_push` executes these steps, allocates `recv`, and then lets each rank push a shard of three rows into `recv`
# on both ranks. Round 1 is what the blocks held before, and round 2 is the push.

# %% diverge
from cpkit_lessons.divergence import simulate_push

early = [("alloc", "old", 8), ("alloc", "kv", 4), ("free", "old", 0)]
late = [("alloc", "old", 8), ("alloc", "kv", 4)]
same = simulate_push([early, early], shard_rows=3, arena_rows=18)
print("equal free lists:", same.explain())
found = simulate_push([early, late], shard_rows=3, arena_rows=18)
figures.show(figures.memory_map(found))

# %% diverge-words
for sentence in found.explain().split("; "):
    print(sentence)
assert found.diverged
assert not same.diverged

# %% diverge-text [markdown]
# No rank has made a mistake that it could detect. Each free list is consistent, but the lists of rank 0 and rank 1 are
# not *equal*. The sender stored at the offset that it had computed for itself. So each of the two ranks is missing
# three rows, and three rows of a block in use are overwritten: nine wrong rows in total. (Each of the last three lines
# above names only the first of its three rows.) This is pytorch#178138. With a captured CUDA graph (kernels that were
# recorded once and are replayed at fixed addresses) it is sglang#34230: garbage output, and no error.

# %% e5-task [markdown]
# ### Exercise 5 · When is a block free?
#
# **Goal** Before every gather, the ranks exchange which blocks they have released: `released[r]` is the set of blocks
# that rank r has released. Each rank then calls `may_free(released, me)`, and frees the blocks that it returns. Offsets
# must always be equal on all ranks, no rank may lose a block that it still uses, and no block may stay allocated longer
# than necessary.
#
# **Example** Rank 0 has released {1, 2}, and rank 1 has released {2, 3}. Only block 2 is free: `may_free([{1, 2}, {2,
# 3}], 0)` is {2}, and rank 1 gets the same answer.
#
# **About** 4 minutes, ★★☆


# %% e5
def may_free(released, me):
    """Return the set of blocks that rank `me` frees in this exchange."""
    # >>> your code
    #: return released[me]
    return set.intersection(*released)
    # <<<


# %% e5-check
lesson.check_may_free(may_free)


# %% e5-mutant-any-rank
def may_free(released, me):
    return set.union(*released)


# %% e5-mutant-rank-0-decides
def may_free(released, me):
    return released[0]


# %% e5-mutant-majority
def may_free(released, me):
    return {b for b in set.union(*released) if 2 * sum(b in d for d in released) > len(released)}


# %% e5-mutant-never
def may_free(released, me):
    return set()


# %% e5-mutant-changes-its-argument
def may_free(released, me):
    released[me].intersection_update(*released)
    return released[me]


# %% e5-help [markdown]
# Two conditions must hold: all ranks free the same blocks, and no rank frees a block that another rank still uses.
#
# ---
# A block is free when *every* rank has released it. That is a logical AND over the ranks, and it is the same on all of
# them.
#
# ---
# `set.intersection(*released)`.
#
# ---
# **Why** A rank that keeps a tensor longer costs memory, but not correctness. cpkit's pool (`memory/pool.py`) sends one
# bit per block, together with a digest of its history, in the agreement at the start of every call of `all_gather_kv`.
# A mismatch raises an error that lists each rank's latest allocations.
#
# **Another way** Never free: allocate all buffers once, by name, and reuse them. Code that is captured in a CUDA graph
# does that. Sorting the free blocks by the same rule on all ranks is not enough, because the ranks still free them at
# different times. PyTorch changed this rule for NCCL's pools, from the address of a block to the time of its allocation
# (pytorch#178362, #182929). The issue about wrong rows after reuse, #190977, is still open (November 2026).

# %% s8 [markdown]
# ## 8. Registered: buffer, group, offset
#
# You have allocated a symmetric buffer. Does NCCL take its *fast path*, a gather with a symmetric kernel that stores
# straight into the memory of the peers? cpkit's reports call the path of such a gather `symmetric`. Whether NCCL takes
# it, and whether the rows are then right, depends on four facts, which must hold **on all ranks**:
#
# | fact | if it does not hold | source |
# |---|---|---|
# | the *buffer* is in symmetric memory | silent fallback | sglang#37337 |
# | it is registered with *this group* | silent fallback | sglang#19329 |
# | the *receive* buffer is at the *same offset* on all ranks | wrong rows, no error: the fast path must not be used | pytorch#178138 |
# | all GPUs of the group reach each other over *NVLink* | silent fallback | `ncclSymkAvailable` in NCCL's `sym_kernels.cc` |
#
# {glossary: window; symmetric kernel; fallback}
#
# The send buffer may be at any offset, because each rank reads its own shard through its own pointer. Only stores go to
# peers. For example, a rank may send its shard from inside the receive buffer (`recv + rank · shard`). That offset
# differs on every rank, and the result is right.
#
# Which of the two buffers must be registered depends on the version of NCCL.

# %% recv-predict
lesson.predict("recv", ...)

# %% versions
lesson.version_table()

# %% recv-reveal
from cpkit.memory.path import BufferLocation, BufferPair, decide

send = BufferLocation(other="ordinary memory", fault="unregistered")
places = [BufferPair(send, BufferLocation(0, 4096))] * 2
path = decide(places, 0, "nccl 2.28.9").path
lesson.reveal("recv", path)

# %% versions-text [markdown]
# The table comes from `cpkit.memory.path`, which follows NCCL's sources of 2.27 to 2.30 (`symmetric_sched.cc`,
# `sym_kernels.cc`). Before 2.27 there are no symmetric kernels. From 2.29.2 on, the first release of 2.29, only the
# receive buffer counts. So the statement "both buffers must be registered" (sglang#37337) is right up to torch 2.11,
# and out of date from torch 2.12.1 on.
#
# The rule "receive only" has three exceptions, which exercise 6 leaves out. Over several nodes, the kernels that cross
# nodes need both buffers. For small messages, NCCL may take the fallback although the receive buffer is registered. Or
# it may select a symmetric kernel although only the *send* buffer is registered, because its kernel for small messages
# (LL) copies through NCCL's own memory (seen with 2.30.7 at 64 KiB per rank).
#
# On the CPU and on a shared GPU, cpkit's ranks push rows without NCCL. That needs a symmetric receive buffer only. With
# one GPU per rank, only `direct` pushes rows. The other algorithms call NCCL, and the table above applies to them.
#
# The last column says whether a symmetric kernel waits for the previous kernel on the same GPU. From 2.28.0 up to and
# including 2.30.4 it does not (sglang#37768), so it may read rows that the preceding kernel is still writing: a stale
# read (section 3). Other kernels of NCCL do wait. `python -m cpkit doctor` warns about the same versions.
#
# NCCL's log shows which kernel it selected; notebook 3 reads that log. The version that counts is the one of the
# *loaded* library (`ncclGetVersion`), not the one with which torch was compiled. `padded_symm_recv` is `padded` with
# the receive buffer in symmetric memory, and `padded_symm` with both buffers there. (Beside `symmetric` and `fallback`,
# there is a third path, `staged`. It occurs where ranks share a GPU and the receive buffer is in ordinary memory: then
# each rank loads the rows of its peers from their symmetric send buffers.) What does each algorithm do on your ranks?

# %% explain
algorithms = ["padded", "padded_symm_recv", "padded_symm", "direct"]
reports = [lab.explain(world.of(4096), cp, algorithm=name).iloc[0] for name in algorithms]
pd.DataFrame(reports, index=algorithms)[["path", "reason"]]

# %% e6-task [markdown]
# ### Exercise 6 · The rule of the fast path
#
# **Goal** Write `fast_path`, which says whether this all-gather may take NCCL's fast path, and whether that path is
# safe. It returns one of three words:
#
# - `"fallback"`: it must not take the fast path: either NCCL has no symmetric kernel for this call, or that kernel
#   would store rows at a wrong offset.
# - `"racy"`: it may take the fast path, but the symmetric kernel of this version does not wait for the previous kernel.
# - `"sound"`: it may take the fast path, and the symmetric kernel of this version waits.
#
# `version` is a tuple, `group` is the name of the gather's group, and all GPUs reach each other over NVLink. `send[r]`
# and `recv[r]` describe the buffers of rank r: `None` (ordinary memory) or `(group, offset)`.
#
# **Example** Two ranks have `recv` at `("attn_cp", 4096)` and `send` in ordinary memory (`None`); the group is
# `"attn_cp"`. The answer is `"fallback"` for version `(2, 28, 9)`, `"racy"` for `(2, 29, 7)`, and `"sound"` for `(2,
# 30, 7)`.
#
# **About** 8 minutes, ★★☆


# %% e6
def fast_path(version, group, send, recv):
    """Return "fallback", "racy" or "sound"."""

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
# First write down what "registered" means for *one* buffer over all ranks. Then ask which buffers must be registered,
# and which must have the same offset on all ranks. Test for the race at the end, because it concerns only calls that do
# not fall back.
#
# ---
# A buffer is registered if no rank has `None` and all ranks name the gather's group. Only `recv` must also have the
# same offset on all ranks. Python compares tuples element by element: `(2, 28, 9) < (2, 29)`.
#
# ---
# `all(b is not None and b[0] == group for b in buffers)`. For `recv`, also require `len(set(recv)) == 1`. Since 2.29,
# `recv` alone is enough. Before that both are required, and before 2.27 the answer is always `"fallback"`. The
# remaining calls are racy if `(2, 28) <= version <= (2, 30, 4)`.
#
# ---
# **Why** NCCL does *not* compare the offsets of the ranks. On two H100s with NCCL 2.28.9, and a receive buffer at a
# different offset on each rank, shards of 64 KiB were right, because the kernel for small messages uses a staging
# buffer. Shards of 2 MiB were wrong on every rank, without an error. So if a caller passes its own buffers, cpkit's
# ranks exchange their locations before every gather (`cp_all_gather_into_tensor_async`; `locate.py`, `path.py`). If the
# receive offsets differ, the ranks pass ordinary buffers to NCCL instead, and report the path `fallback` with the
# reason.
#
# **Another way** Send from your own slice of the receive buffer. Then one registration covers both buffers on every
# version, and the copy that pads is gone as well. sglang#37337 does the same in SGLang, for the strategy that this
# course calls `interleave`.

# %% s9 [markdown]
# ## 9. Failure lab
#
# What do these mistakes look like when they happen at night, in production? Now you cause them on purpose. Each case
# starts two ranks of its own, makes one mistake on one or both of them, and ends both. The ranks wait at most 1.5 s for
# each other, and your workers above are not involved. In the messages, `cp2.0.0` is the name of the group of these two
# ranks, and `tensor 0` is the first of the gathered tensors. The 8 tokens are split in order: rank 0 owns tokens 0 to
# 3, and rank 1 tokens 4 to 7. Before each run, predict: **what will the ranks observe?**
#
# - `error at once`: the ranks raise an error immediately;
# - `error after the deadline`: a rank waits until the deadline, and then raises an error;
# - `fast path missed`: no error, and every row is right, but at least one of three *transports* (what moves the rows)
#   takes the fallback path with these buffers. The transports are `posix`, which these two ranks use, and NCCL 2.28.9
#   and 2.29.7, whose paths are computed;
# - `silently wrong`: no error, and some rows are wrong.

# %% lab
from cpkit_lessons.failure_lab import CASES, inject_fault

cards = {}


def run(case):
    """Run one case, store its post-mortem, and show it."""
    cards[case] = inject_fault(case)
    return cards[case]


# %% skips-text [markdown]
# ### One rank skips the rendezvous
#
# Rank 1 takes a branch in which it allocates no symmetric memory, for example because it has no tokens in this batch.

# %% skips-predict
lesson.predict("skips_the_rendezvous", ...)

# %% skips tags=["nbval-ignore-output"]
run("skips_the_rendezvous")

# %% skips-reveal
lesson.reveal("skips_the_rendezvous", cards["skips_the_rendezvous"].symptom)

# %% sizes-text [markdown]
# ### Sizes differ
#
# Each rank sizes a scratch buffer by its own number of rows, so the scratch buffer of rank 1 is one row larger. The
# gather that follows does not use it: its tensors have equal shapes on both ranks.

# %% sizes-predict
lesson.predict("sizes_differ", ...)

# %% sizes tags=["nbval-ignore-output"]
run("sizes_differ")

# %% sizes-reveal
lesson.reveal("sizes_differ", cards["sizes_differ"].symptom)

# %% receive-text [markdown]
# ### Receive-only registration
#
# This is sglang#24040 as it was merged: the output is in symmetric memory, and the shard in ordinary memory. The cell
# below prints one path per transport. The paths of the two versions of NCCL are computed from the same buffers by the
# rule of section 8.

# %% receive-predict
lesson.predict("receive_only", ...)

# %% receive tags=["nbval-ignore-output"]
run("receive_only")

# %% receive-reveal
lesson.reveal("receive_only", cards["receive_only"].symptom)

# %% group-text [markdown]
# ### The wrong group
#
# Both buffers are symmetric, but they are in the pool of another group.

# %% group-predict
lesson.predict("wrong_group", ...)

# %% group tags=["nbval-ignore-output"]
run("wrong_group")

# %% group-reveal
lesson.reveal("wrong_group", cards["wrong_group"].symptom)

# %% lists-text [markdown]
# ### Divergent free lists
#
# This is section 7 on real shared memory: the ranks do not compare their free lists, and rank 1 has kept a block that
# rank 0 has freed. Before the gather, the outputs are filled with *poison*, a pattern that no row contains. Rows are
# compared in *lanes* of 8 bytes.

# %% lists-predict
lesson.predict("divergent_free_lists", ...)

# %% lists tags=["nbval-ignore-output"]
run("divergent_free_lists")

# %% lists-reveal
lesson.reveal("divergent_free_lists", cards["divergent_free_lists"].symptom)

# %% full-text [markdown]
# ### Shared memory is full
#
# The arena is larger than the free space in `/dev/shm`. Containers often have only 64 MB of it in total.

# %% full-predict
lesson.predict("shared_memory_is_full", ...)

# %% full tags=["nbval-ignore-output"]
run("shared_memory_is_full")

# %% full-reveal
lesson.reveal("shared_memory_is_full", cards["shared_memory_is_full"].symptom)

# %% dies-text [markdown]
# ### A rank dies
#
# Rank 1 is killed before it arrives at the gather, as Linux kills a process when memory runs out.

# %% dies-predict
lesson.predict("a_rank_dies", ...)

# %% dies tags=["nbval-ignore-output"]
run("a_rank_dies")

# %% dies-reveal
lesson.reveal("a_rank_dies", cards["a_rank_dies"].symptom)

# %% cards-text [markdown]
# ### All post-mortems side by side
#
# There are seven causes, but only four symptoms. So the symptom alone does not identify the cause. What else do the
# ranks report? Look at how each process ended, and at the post-mortems above: the type of an error, its message, and
# the reason for a fallback.

# %% cards
assert list(cards) == list(CASES)
symptoms = {case: card.symptom for case, card in cards.items()}
exits = {case: ", ".join(rank.ended for rank in card.ranks) for case, card in cards.items()}
pd.DataFrame({"symptom": symptoms, "rank 0, rank 1": exits})

# %% e7-task [markdown]
# ### Exercise 7 · From post-mortem to cause
#
# **Goal** Write `cause`, which returns the name of the mistake (one of `CASES`, the names in the table above), given
# what the ranks observed. `ranks` is a list with one report per rank. Each report has the attributes `rank`,
# `exit_code` (the negative signal number if a Unix signal killed the process), `error` (the name of the exception's
# type, or ""), `message` (the text of the exception, or a note), `waited_s` (the seconds from the start of the case to
# the report), `paths` (from transport to path), `reason` (one string, with a line for each transport that says why it
# takes its path), and `wrong` (a description of the first wrong row, or ""). The reports are in any order. To see one,
# run `cards["wrong_group"].ranks[0]`.
#
# **Example** One rank reports `BarrierTimeout`, and the other has exit code −9. The answer is `"a_rank_dies"`.
#
# **About** 8 minutes, ★★☆


# %% e7
def cause(ranks):
    """Return one of CASES."""
    # >>> your code
    #: return "skips_the_rendezvous"
    said = " ".join(rank.message + rank.reason for rank in ranks)
    if any(rank.error == "BarrierTimeout" for rank in ranks):
        killed = any(rank.exit_code < 0 for rank in ranks)
        return "a_rank_dies" if killed else "skips_the_rendezvous"
    if any(rank.error for rank in ranks):
        return "shared_memory_is_full" if "too full" in said else "sizes_differ"
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
        return "shared_memory_is_full" if "too full" in ranks[0].message else "sizes_differ"
    if ranks[0].wrong:
        return "divergent_free_lists"
    return "wrong_group" if "another group" in ranks[0].reason else "receive_only"


# %% e7-mutant-no-error-no-problem
def cause(ranks):
    for rank in ranks:
        if rank.exit_code < 0:
            return "a_rank_dies"
        if "too full" in rank.message:
            return "shared_memory_is_full"
        if rank.error == "SymmetricMemoryError":
            return "sizes_differ"
    return "receive_only"


# %% e7-mutant-number-of-the-barrier
def cause(ranks):
    said = " ".join(rank.message + rank.reason for rank in ranks)
    if any(rank.error == "BarrierTimeout" for rank in ranks):
        return "a_rank_dies" if "barrier 2" in said else "skips_the_rendezvous"
    if any(rank.error for rank in ranks):
        return "shared_memory_is_full" if "too full" in said else "sizes_differ"
    if any(rank.wrong for rank in ranks):
        return "divergent_free_lists"
    return "wrong_group" if "another group" in said else "receive_only"


# %% e7-mutant-a-timeout-is-a-death
def cause(ranks):
    said = " ".join(rank.message + rank.reason for rank in ranks)
    if any(rank.error == "BarrierTimeout" for rank in ranks):
        return "a_rank_dies"
    if any(rank.error for rank in ranks):
        return "shared_memory_is_full" if "too full" in said else "sizes_differ"
    if any(rank.wrong for rank in ranks):
        return "divergent_free_lists"
    return "wrong_group" if "another group" in said else "receive_only"


# %% e7-help [markdown]
# Sort by evidence: first an exit code that only a killed process leaves, then errors, then wrong rows, then paths.
#
# ---
# A timeout has two causes, and the exit code of the *other* rank tells them apart. An error at once has two causes,
# and the message tells them apart. Without an error, three causes remain: one leaves wrong rows, and the reason for the
# path tells the other two apart.
#
# ---
# `any(r.error == "BarrierTimeout" …)`, then `any(r.exit_code < 0 …)`; `any("too full" in r.message …)`;
# `any(r.wrong …)`; `any("another group" in r.reason …)`.
#
# ---
# **Why** The rank that reports an error is often not the one that caused it. A post-mortem needs *all* ranks: which
# rank waited for which, and how each of them ended.
#
# **Another way** Use a table from (symptom, detail) to cause. It is shorter. It also shows the requirement: if two
# causes share a symptom, some detail must differ. If none differs, your logs contain too little.

# %% s10 [markdown]
# ## 10. Your own pull gather
#
# Can you write the whole operation now? It gathers uneven shards straight into token order, and it stays right in any
# order of events. Each rank stores its shard in its symmetric buffer, and *loads* from its peers.

# %% e8-task [markdown]
# ### Exercise 8 · A pull gather
#
# **Goal** Write one round of `pull_gather`. `shard` contains the rows of this rank, and `out` has room for the whole
# result in token order. At first it contains only poison (section 9). `tokens[r]` lists the tokens of rank r, in the
# order in which it stores them. `yield me.store(shard)` copies rows into my symmetric buffer, and `yield me.load(peer,
# count)` returns the first `count` rows of a peer's buffer. `yield me.barrier()` waits for all ranks. `me.rank` is the
# number of this rank, and `me.size` that of all ranks. The next round uses the same buffers. Order the loads so that no
# two ranks load from the same rank at the same time, if all ranks are equally fast.
#
# **Example** With 2 ranks and `tokens` = [[0, 3], [1, 2]], `out[[0, 3]]` becomes the two rows of rank 0 on both ranks,
# and `out[[1, 2]]` those of rank 1.
#
# **About** 12 minutes, ★★★


# %% e8
def pull_gather(me, shard, out, tokens):
    """Fill `out` with the rows of all ranks, in token order."""
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
# Again, two orders must hold: each store comes before its loads, and each load comes before the next store. Then ask:
# where in `out` does row i of a peer belong?
#
# ---
# Store, wait at a barrier, load from all ranks, and wait at a second barrier. `out[tokens[peer]] = rows` puts each row
# at its token. No padding, no strip and no reorder are needed.
#
# ---
# `for step in range(me.size): peer = (me.rank + step) % me.size`, then load `len(tokens[peer])` rows. Without the
# rotation, the check reports how many ranks load from the same rank at the same time.
#
# ---
# **Why** If all ranks read from rank 0 first, its memory serves all of them while the memories of the other ranks are
# idle. With the rotation, each rank reads from a different peer in every step, as in cpkit's `pull_shards`. A rank's
# own rows need no load: with `out[tokens[me.rank]] = shard`, you load fewer rows than the solution above. PyTorch's
# `_low_contention_all_gather` avoids a different kind of contention. It uses copy engines, the GPU's hardware for
# copies, so that it takes no multiprocessors from *computation* that runs at the same time (pytorch#130583).
#
# **Another way** Push: `put` your rows at their tokens in the *output* of every peer. Then `out`, not the shard, must
# be in symmetric memory, and `out` is complete after the barrier at the end. That is `algorithm="direct"`, which
# notebook 3 measures.

# %% real-text [markdown]
# Now your workers run a real gather twice: `direct` with symmetric memory, and the same call without it, which cpkit
# then runs as `padded`. Every byte is checked.

# %% real
tokens = world.of(4096) + 1
on = lab.gather(tokens, cp_size=cp, algorithm="direct", show=False)
off = lab.gather(tokens, cp_size=cp, algorithm="direct", symmetric=False, show=False)
assert on.verified
assert off.verified, "both are right; the second one ran as padded"
assert (on.path, off.path) == ("symmetric", "fallback")
print("symmetric memory on: ", on.path)
print("symmetric memory off:", off.path, "|", off.path_reason)

# %% s11 [markdown]
# ## 11. Straight into a paged cache
#
# Attention in a serving engine does not read a dense tensor. It reads a *paged cache*, whose pages are assigned to
# requests one by one. So after the usual gather, one more pass inserts each row into its page. Can a rank store its
# rows there directly?
#
# {glossary: paged cache}
#
# A rank can store its rows there directly if the cache is in symmetric memory. Every rank has the list of the request's
# pages, so it can compute the slot of each token: `slot = pages[t // 4] * 4 + t % 4` with pages of 4 slots.
# `all_gather_kv(…, into=[cache], slots=slots)` stores each row in that slot of every peer's cache. Here a request of 11
# tokens has the pages 5, 2 and 0.

# %% slot-predict
lesson.predict("slot", ...)


# %% publish
def publish(group):
    import torch
    from cpkit.gather import all_gather_kv
    from cpkit.layout import prepare_context_parallel_metadata
    from cpkit.symm import use_symmetric_memory

    pages = torch.tensor([5, 2, 0])  # the pages of this request, of 4 slots each
    slots = (pages[:, None] * 4 + torch.arange(4)).flatten()[:11]
    with use_symmetric_memory(group):
        cache = torch.full((24, 1), -1)  # 6 pages
    layout = prepare_context_parallel_metadata([11], group.size)
    rows = layout.rank_rows(group.rank)[:, None]  # each row holds the number of its token
    all_gather_kv([rows], layout, group, into=[cache], slots=slots)
    return cache.flatten().tolist()


# %% publish-run
caches = in_ranks(publish, 2)
assert caches[0] == caches[1], "all ranks have the same cache"
assert sorted(caches[0])[-11:] == list(range(11)), "every token is there, once"
assert caches[0].count(-1) == 24 - 11, "no other slot was written"
pages = pd.DataFrame([caches[0][4 * page : 4 * page + 4] for page in range(6)])
pages.rename_axis("page").rename(columns="+{}".format).replace(-1, "·")

# %% slot-reveal
lesson.reveal("slot", caches[0].index(6))

# %% publish-after [markdown]
# Each row was written once, straight to its final slot on both ranks. There is no padding, no strip, no reorder and no
# insertion.
#
# vLLM calls this *direct publication*, and has three open pull requests for it (November 2026). #49517 introduces it
# for one model, with an FP8 cache, four GPUs and no CUDA graphs. #52863 allocates the cache in PyTorch's symmetric
# memory. #57115 keeps vLLM's own cache, and maps it on all peers. In each of them, a rank stores its final rows in the
# cache of every peer, and a barrier then publishes them. In #52863, the gather remains as a fallback.
#
# Which ranks must agree before a page is reused? All of them, because a peer may still be reading the page. This is one
# reason why `all_gather_kv` synchronizes all ranks before it stores any row. One signal per peer would be safe too, and
# finer: a rank then stores at each peer as soon as the signal of that peer has arrived, without waiting for the others.

# %% progress
lesson.progress()

# %% end [markdown]
# ## What to remember
#
# - Symmetric means: the same offset on every rank. Pointers may differ.
# - There are two waits: before a rank reads what its peers wrote, and before any rank writes there again. A test of one
#   round never detects a missing second wait.
# - With signals, a rank waits only for the peers whose data it reads or whose memory it overwrites. At a barrier, it
#   waits for all ranks.
# - A spill is a collective at run time. Warm up with the largest batch that you expect.
# - A block is free when *all* ranks have released it. Unless the ranks compare their free lists, a difference gives
#   wrong rows, not errors.
# - Within a node, NCCL takes its fast path if the right buffers are registered with the right group and NVLink joins
#   all GPUs. The rows are right only if the receive buffer has the same offset on all ranks. Which buffers count
#   depends on the version of NCCL, and some versions have a race. So always look at the path and at the version.
# - The rank that reports an error is often not the one that caused it.
#
# **You can now read**
#
# - SGLang's `pynccl_allocator.py` (`use_symmetric_memory`, which registers in `__exit__`) and `cp/zigzag.py`
#   (`_all_gather_reorganized`, which registers the receive side only), and the threads #24040, #37337, #19329, #36943;
# - PyTorch's `torch/distributed/_symmetric_memory/__init__.py` (`rendezvous`, `put_signal`,
#   `_low_contention_all_gather`);
# - NCCL's `scheduler/symmetric_sched.cc` and `sym_kernels.cc`;
# - cpkit's `sync/barrier.py`, and in `memory/`: `allocator.py`, `pool.py`, `path.py`.
#
# **An open problem** The memory of the simulator is sequentially consistent: all ranks see each step at the same time.
# The memory of a GPU is not. Extend `simulate.py` with a store buffer for each rank, and find the smallest program that
# passes without store buffers and fails with them.
#
# Next: `03_allgather_perf.ipynb`.
