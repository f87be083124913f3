# %% title [markdown]
# # 1 · Padding and reorganization
#
# A long prompt keeps one GPU busy for too long. Context parallelism cuts the sequence: every rank computes a few
# of its tokens. But attention needs the keys and values of **all** tokens. So the ranks gather the KV cache:
# pad, all-gather, strip, reorder. This notebook shows each of these steps on real processes.
#
# **Time** 25 minutes. **Needs** any laptop: four CPU processes. **Know before** tensors, and what a KV cache is.
#
# You will be able to
# 1. say which rank owns token *t*, for three strategies;
# 2. compute how many rows are padding, and name the formula that gets it wrong;
# 3. draw the buffer after each stage of the gather;
# 4. write the reorganization as one permutation.
#
# | word | meaning | here |
# |---|---|---|
# | token, row | one position of the KV cache; a row is its `[heads, head_dim]` slice | |
# | `cp_size` | ranks that share the batch | 4 |
# | `per_rank_actual_token` | rows that each rank really holds | |
# | `max_rank_len` | rows of each rank after padding | |
# | rank order | rank 0's rows, then rank 1's, … | |
# | token order | token 0, 1, 2, … | |
#
# In every figure **a colour is a rank**, **hatching is padding**, and **red is wrong**.

# %% connect tags=["nbval-ignore-output"]
import cpkit

lab = cpkit.connect()
status = lab.status()
print(f"{status.world_size} ranks on {status.device}, torch {status.torch_version}")
print("symmetric memory:", status.symmetric_backend)

# %% connect-text [markdown]
# That found running worker processes, or started them with `torchrun`. This notebook is not one of them: it
# sends them orders over a socket. Workers that it started end with its kernel.

# %% setup
import numpy as np
import pandas as pd
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.notebook import figures
from cpkit.notebook.lessons import padding as lesson

cp = max(size for size in lab.cp_sizes if size <= 4)
assert cp == 4, f"the text below speaks of 4 ranks; these workers can form {lab.cp_sizes}"

# %% s1 [markdown]
# ## 1. Who owns token t?
#
# One sequence, 24 tokens, 4 ranks. A *strategy* says who owns what.
#
# - **zigzag**: cut into 2·cp blocks; rank r owns block r and block 2·cp−1−r.
# - **interleave**: token t goes to rank t mod cp.
# - **contiguous**: one block a rank.

# %% ownership
strategies = ("zigzag", "interleave", "contiguous")
layouts = {name: prepare_context_parallel_metadata([24], cp, name) for name in strategies}
figures.show(figures.ownership_strip(list(layouts.values())))

# %% bijection-text [markdown]
# Whatever the strategy: every token has exactly one owner. `rank_rows(rank)` lists a rank's tokens. Over
# all ranks that is a permutation.

# %% bijection
for name, layout in layouts.items():
    rows = [layout.rank_rows(rank).tolist() for rank in range(cp)]
    print(f"{name:10}  rank 0 holds {rows[0]}")
    owned = [token for held in rows for token in held]
    assert sorted(owned) == list(range(24)), "every token exactly once"


# %% e1-task [markdown]
# ### Exercise 1 · Who owns token t?
#
# **Goal** Write `owner`: the rank that owns a token of one zigzag sequence.
#
# **Example** 9 tokens over 2 ranks are blocks of 3, 2, 2, 2 tokens: the first `9 % 4` blocks are one longer.
# Tokens 0, 1, 2 are block 0, so `owner(2, 9, 2)` is 0; token 3 is block 1, so `owner(3, 9, 2)` is 1.
#
# **About** 6 minutes, ★☆☆


# %% e1
def owner(token, length, cp_size):
    """Rank that owns a token of a zigzag sequence of `length` tokens."""
    # >>> your code
    #: return 0
    size, longer = divmod(length, 2 * cp_size)
    edge = longer * (size + 1)  # the longer blocks end here
    block = token // (size + 1) if token < edge else longer + (token - edge) // size
    return min(block, 2 * cp_size - 1 - block)
    # <<<


# %% e1-check
lesson.check_owner(owner)


# %% e1-mutant-even-blocks
def owner(token, length, cp_size):
    block = token * 2 * cp_size // length
    return min(block, 2 * cp_size - 1 - block)


# %% e1-mutant-no-mirror
def owner(token, length, cp_size):
    size, longer = divmod(length, 2 * cp_size)
    edge = longer * (size + 1)
    block = token // (size + 1) if token < edge else longer + (token - edge) // size
    return block % cp_size


# %% e1-help [markdown]
# First find the block. Only then ask whose block it is.
#
# ---
# `divmod(length, 2 * cp_size)` gives the size of a block and how many blocks are one longer. Those come first.
#
# ---
# Two cases: a token before `longer * (size + 1)` lies in a longer block. Then `min(block, mirror of block)`.
#
# ---
# **Why** Block b and its mirror 2·cp−1−b belong to the same rank, so the smaller of the two is the rank.
#
# **Another way** Build the list of all owners with `rank_rows` and look the token up. That is what the check does.

# %% s2 [markdown]
# ## 2. Why zigzag?
#
# Attention is causal: token t looks at t + 1 keys. Late tokens cost more. Count the keys that each rank
# must look at. Before you run the cell: which strategy gives rank 3 the most work?


# %% work
def keys_seen(layout, rank):
    return int((layout.rank_rows(rank) + 1).sum())


work = pd.DataFrame(
    {name: [keys_seen(layout, rank) for rank in range(cp)] for name, layout in layouts.items()},
    index=[f"rank {rank}" for rank in range(cp)],
)
assert work["zigzag"].nunique() == 1, "zigzag pairs an early block with a late one"
assert work["contiguous"].max() > 5 * work["contiguous"].min()
work.rename_axis("keys looked at")

# %% work-text [markdown]
# Contiguous makes the last rank work six times as much as the first. Zigzag pairs each early block with a
# late one, and all ranks finish together. That is why it is the default.

# %% s3 [markdown]
# ## 3. Why pad?
#
# A real batch is ragged. Here are two sequences, of 13 and 9 tokens. 22 tokens over 4 ranks do not divide evenly,
# and a collective wants the same size from everybody. So each rank pads to the longest.

# %% padding
batch = [13, 9]
layout = prepare_context_parallel_metadata(batch, cp)
print("rows each rank holds:", layout.per_rank_actual_token)
print("padded to:           ", layout.max_rank_len[0])
figures.show(figures.padding_grid(layout))

# %% waste-predict
lesson.predict("waste", ...)

# %% waste-reveal
slots = sum(layout.max_rank_len)
lesson.reveal("waste", (slots - sum(batch)) / slots)

# %% waste-text [markdown]
# How much is wasted depends on the batch. Long sequences lose nearly nothing; many short ones lose a lot.
# Where a sequence has fewer than 2·cp tokens, zigzag can't split it at all.

# %% waste
batches = [[32768], [4097], [4097, 812, 95], [17] * 8, [9] * 4]
figures.show(figures.waste_map(batches, cp_sizes=[1, 2, 4, 8]))

# %% trap-text [markdown]
# ### A formula that is wrong
#
# Much code computes the padded length as ceil(total / cp). That is right for *one* sequence. Now 16
# sequences of 4097 tokens. Each has one token too many, and zigzag always gives it to rank 0.

# %% trap
many = prepare_context_parallel_metadata([4097] * 16, cp)
formula = -(-many.total_tokens // cp)
print("rows each rank holds:", many.per_rank_actual_token)
print("ceil(total / cp):    ", formula)
print("rows cut off:        ", max(many.per_rank_actual_token) - formula)
assert formula < max(many.per_rank_actual_token), "the formula would cut off rows of rank 0"

# %% s4 [markdown]
# ## 4. The real gather
#
# Now the workers do it. `algorithm="padded"` is the classic pipeline. Every row carries a stamp: round, rank,
# sequence, token. The workers compare every byte with the stamp that belongs there.

# %% gather
gathered = lab.gather(batch, cp_size=cp, algorithm="padded", round=7)
assert gathered.verified
assert gathered.checked_rows >= sum(batch)
print("algorithm:", gathered.algorithm, "| path:", gathered.path)
print("stages:   ", " → ".join(gathered.stages))

# %% shard-text [markdown]
# ### Before: the shards
#
# Each rank holds its own rows, and nothing else. A cell shows `sequence:token`.

# %% shard
figures.show(figures.stage_grid(gathered, ["shard"]))

# %% pad-text [markdown]
# ### Stage 1: pad
#
# Every rank makes its buffer `max_rank_len` rows long. The rank that holds the most pads nothing.

# %% pad
figures.show(figures.stage_grid(gathered, ["pad"]))
pads = [int((gathered.stage("pad", rank)[:, 1] < 0).sum()) for rank in range(cp)]
assert pads == [gathered.max_rank_len - rows for rows in gathered.per_rank_actual_token]

# %% wire-text [markdown]
# ### Stage 2: the wire
#
# The collective puts all buffers one after another. Every rank now has the same big buffer, with the padding
# in it.

# %% wire
figures.show(figures.stage_grid(gathered, ["wire"], rank=0))
wire = gathered.stage("wire", 0)
assert len(wire) == cp * gathered.max_rank_len
assert all((gathered.stage("wire", rank) == wire).all() for rank in range(cp))

# %% strip-text [markdown]
# ### Stage 3: strip
#
# One copy drops the padding. What is left is in *rank order*.

# %% strip
figures.show(figures.stage_grid(gathered, ["strip"], rank=0))
strip = gathered.stage("strip", 0)
assert (strip == wire[wire[:, 1] >= 0]).all(), "strip drops the padding and nothing else"

# %% reorder-text [markdown]
# ### Stage 4: reorder
#
# One more copy puts the tokens in order: sequence 0 from its first token to its last, then sequence 1. This is
# what attention reads.

# %% reorder
figures.show(figures.stage_grid(gathered, ["reorder"], rank=0))
reorder = gathered.stage("reorder", 0)
assert (reorder[:, 2] == [0] * 13 + [1] * 9).all()
assert (reorder[:, 3] == [*range(13), *range(9)]).all()
assert (reorder[:, 0] == 7).all(), "all rows are of the round we asked for"

# %% s5 [markdown]
# ## 5. The permutation is the spec
#
# Strip and reorder look like two operations. They are one index. `rank_order[i]` is the token that stands at
# place i after the strip. Its inverse reorganizes.

# %% permutation
token_order = layout.token_order.numpy()
print("rank order: ", layout.rank_order.tolist())
print("its inverse:", token_order.tolist())
assert (strip[token_order] == reorder).all(), "x[token_order] is the whole reorganization"
assert (layout.rank_order.numpy()[token_order] == np.arange(sum(batch))).all()

# %% s6 [markdown]
# ## 6. Then why copy four times?
#
# Every rank knows the permutation *before* anything moves. So it can write each of its rows directly at its
# final place, in every peer's output. No padding, no strip, no reorder. That is `algorithm="direct"`.

# %% direct
direct = lab.gather(batch, cp_size=cp, algorithm="direct", round=7)
last = direct.stages[-1]
print("stages of direct:", " → ".join(direct.stages))
assert (direct.stage(last, 0) == reorder).all(), "the same bytes, from one pass"
figures.show(figures.stage_grid(direct))

# %% direct-text [markdown]
# The result is the same, byte for byte. Writing into a peer's memory needs *symmetric memory*. Notebook 2 is
# about that. Notebook 3 measures what it saves.

# %% s7 [markdown]
# ## 7. Try it
#
# Move the slider, or focus it and press the arrow keys. Each change runs a new gather on the workers, checks
# every byte, and redraws.

# %% stepper
from cpkit.notebook.stepper import Stepper

stepper = Stepper(lab, batch, cp_size=cp)
stepper

# %% stepper-check
stepper.wait(gathers=1)
stepper.cp_size.value = 2  # as if you had moved the slider
stepper.wait(gathers=2)
assert len(stepper.widget.data[0].y) > 0

# %% progress
lesson.progress()

# %% end [markdown]
# ## What to remember
#
# - The layout is a permutation; everything else follows from it.
# - The padded length is the *maximum over ranks*. ceil(total / cp) is too small for some batches.
# - Pad, wire, strip, reorder: four passes over the data. One would do.
#
# **You can now read** SGLang's `cp_utils.py`: `cp_all_gather_reorganized_into_tensor_kv_cache` is stages 1 to 3,
# `cp_all_gather_rerange_kv_cache` is all four. Next: `02_symmetric_memory.ipynb`.
