# %% title [markdown]
# # 2 · Symmetric memory
#
# A collective hides how bytes travel. With *symmetric memory* a rank writes into a peer's memory as if it were
# its own. That is fast. It also moves the burden to you: nobody waits unless you say so.
#
# **Time** 25 minutes. **Needs** any laptop: the ranks share POSIX shared memory. **Know before** notebook 1.
#
# You will be able to
# 1. say what is symmetric about symmetric memory: the offset, not the pointer;
# 2. show what goes wrong without a barrier, and name it;
# 3. size a pool so that nothing is registered at run time;
# 4. read which *path* a gather took, and why.
#
# | word | meaning |
# |---|---|
# | segment | one registered allocation: every rank made it, every rank mapped it |
# | arena, pool | the big segment made up front; the allocator over it |
# | spill | an allocation that did not fit the arena and made a new segment at run time |
# | put | write into a peer's memory |
# | path | what a gather really did: `symmetric`, `staged` or `fallback`, with the reason |

# %% connect tags=["nbval-ignore-output"]
import cpkit

lab = cpkit.connect()
status = lab.status()
print(f"{status.world_size} ranks on {status.device}, torch {status.torch_version}")
print("symmetric memory:", status.symmetric_backend)

# %% setup
import pandas as pd
from cpkit.notebook import figures

cp = max(size for size in lab.cp_sizes if size <= 4)
MB = 1_000_000
assert cp == 4, f"the text below speaks of 4 ranks; these workers can form {lab.cp_sizes}"

# %% s1 [markdown]
# ## 1. What is symmetric?
#
# Every rank allocates the same buffer and maps everybody's. Where it lies in a process differs from rank to
# rank. Where it lies *in the segment* does not. So "offset 4096 in the memory of rank 2" means the same to all.

# %% put
put = lab.put(cp, rounds=1)
assert len(set(put.offsets)) == 1, "the same offset on every rank"
print("byte offset of the buffer on each rank:", list(put.offsets))

# %% addresses tags=["nbval-ignore-output"]
addresses = [hex(address) for address in put.addresses]
pd.DataFrame({"rank": range(cp), "address": addresses, "offset_bytes": put.offsets})

# %% addresses-text [markdown]
# A pointer is useless to a peer. An offset is all it needs.

# %% s2 [markdown]
# ## 2. Put: write into a peer
#
# Each rank wrote a stamp into its own slot of every peer's memory. Then it read its own memory. A stamp is
# `writer << 32 | round`, so it says who wrote it, and when.

# %% who
assert (put.writers == range(cp)).all(), "slot w of every rank was written by rank w"
assert (put.matrix == 1).all(), "and all of it in round 1"
figures.show(figures.who_wrote_where(put.stamps, rounds=1))

# %% s3 [markdown]
# ## 3. The barrier that makes it safe
#
# Do that again and again: 1000 rounds. In each, all write, all meet at a barrier, all read. Is every read fresh?

# %% with-barrier
safe = lab.put(cp, rounds=1000, barrier=True)
print(f"{safe.reads} reads: {safe.stale} stale, {safe.ahead} from a later round")
assert safe.stale == 0
assert safe.ahead == 0

# %% predict [markdown]
# Now leave the barrier out. Guess first: how many of the reads are wrong? One in a thousand? One in ten?

# %% without-barrier tags=["nbval-ignore-output"]
unsafe = lab.put(cp, rounds=1000, barrier=False)
wrong = unsafe.stale + unsafe.ahead
print(f"{unsafe.reads} reads: {unsafe.stale} stale, {unsafe.ahead} from a later round")
print(f"wrong: {wrong / unsafe.reads:.0%}")
assert unsafe.reads == safe.reads
assert wrong > 0, "without a barrier somebody reads too early or too late"

# %% without-examples tags=["nbval-ignore-output"]
for example in unsafe.examples[:3]:
    print(example)
figures.show(figures.who_wrote_where(unsafe.stamps, rounds=1000))

# %% barrier-text [markdown]
# - **Stale** (read after write): the reader came before the writer.
# - **Ahead** (write after read): the writer was already in the next round, and overwrote what was not yet read.
#
# The second is why a buffer needs two waits: one before it is read, one before it is *used again*.

# %% s4 [markdown]
# ## 4. The pool
#
# Making a segment is slow: all ranks must take part. So a pool makes one big *arena* up front and hands out
# pieces. Give it 8 MB and fill it.

# %% pool
history = [("8 MB arena", lab.pool.configure(8 * MB, cp))]
history.append(("hold 3 MB", lab.pool.allocate(3 * MB, cp)))
history.append(("hold 3 MB more", lab.pool.allocate(3 * MB, cp)))
lab.pool.stats(cp)[["rank", "segments", "arena_bytes", "used_bytes", "spills"]]

# %% spill-text [markdown]
# 6 of 8 MB are in use. Now ask for 6 MB more. It can't fit. What should a pool do: fail, or grow?

# %% spill
history.append(("hold 6 MB: spill", lab.pool.allocate(6 * MB, cp)))
after = lab.pool.stats(cp)
assert (after["spills"] == 1).all()
assert (after["spill_bytes"] > 0).all()
history.append(("release all", lab.pool.release(cp)))
after[["rank", "segments", "arena_bytes", "spill_bytes", "used_bytes", "spills"]]

# %% pool-figure
figures.show(figures.pool_fill(history))

# %% spill-cost-text [markdown]
# It grew: a *spill*. On a serving system that is a hidden collective in the middle of a request. If one rank
# has a different idea of what is free, only *some* ranks enter it, and all wait.

# %% spill-cost tags=["nbval-ignore-output"]
cost = after["registering_ms"].max()
print(f"registering segments has cost {cost:.1f} ms so far, on the slowest rank")

# %% s5 [markdown]
# ## 5. Warm up
#
# The cure: say before the first request how many tokens may come. `warm_up` makes room for them once.

# %% warm
warm = lab.pool.warm_up(max_tokens=8192, cp_size=cp)
for tokens in (8192, 1000, 4097):
    assert lab.gather(tokens, cp_size=cp, algorithm="direct", show=False).verified
now = lab.pool.stats(cp)
assert (now["spills"] == warm["spills"]).all(), "no gather had to grow the pool"
print("spills during three gathers:", int((now["spills"] - warm["spills"]).sum()))

# %% s6 [markdown]
# ## 6. Which path, and why?
#
# A gather that *could* be fast may quietly be slow. So ask. `explain` says for each algorithm which memory the
# two buffers are in and what follows from it.

# %% explain
algorithms = ["padded", "padded_symm_recv", "padded_symm", "direct"]
reports = pd.concat([lab.explain(4096, cp, algorithm=name).head(1) for name in algorithms])
reports.assign(algorithm=algorithms)[["algorithm", "path", "send", "recv"]].set_index("algorithm")

# %% off-text [markdown]
# `symmetric=False` stands for a batch whose sizes differ between ranks: symmetric memory is not allowed then, and
# every algorithm must fall back. The result stays the same.

# %% off
off = lab.gather(4096, cp_size=cp, algorithm="direct", symmetric=False, show=False)
on = lab.gather(4096, cp_size=cp, algorithm="direct", symmetric=True, show=False)
assert (on.path, off.path) == ("symmetric", "fallback")
assert on.verified
assert off.verified, "both are right; only one is fast"
print("on: ", on.path_reason)
print("off:", off.path_reason)

# %% end [markdown]
# ## What to remember
#
# - Symmetric means: the same offset on every rank. Pointers differ.
# - Two waits: before you read what peers wrote, and before anybody writes there again.
# - A spill is a collective at run time. Warm up with the largest batch you will see.
# - Always ask for the path. A silent fallback gives right results, slowly.
#
# **You can now read** SGLang's `pynccl_allocator.py` (`use_symmetric_memory`) and PyTorch's
# `torch.distributed._symmetric_memory`. Next: `03_allgather_perf.ipynb`.
