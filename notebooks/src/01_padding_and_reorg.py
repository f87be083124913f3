# %% title [markdown]
# # 1 · Padding and reorganization
#
# (The saved outputs show the right answers to the questions, although the cells contain `...`: choose *Edit → Clear
# Outputs of All Cells* before you begin.)
#
# A long prompt keeps one GPU busy for too long. *Context parallelism* (CP) therefore splits the tokens of each sequence
# over several GPUs. Each GPU has one process, called a *rank*. But the tokens of each rank attend to keys and values
# that **other** ranks hold. So the ranks gather the KV cache in every layer: they pad their parts to the same number of
# rows (one row per token), exchange them, strip the padding, and reorder the rows. A serving engine pays for this
# gather in each layer of each long request. In this notebook real processes run it, and you write each step.
#
# **Time** 70 minutes. **Needs** Linux on x86-64, and no GPU: without one, the ranks are CPU processes.
# **Prerequisites** tensors, and what a KV cache is.
#
# After this notebook you can
# 1. say which rank owns token *t*, and what the choice of strategy (the rule that assigns tokens to ranks) costs in
#    causal attention;
# 2. compute how many slots are padding, and name the formula that gets the padded length wrong;
# 3. write strip and reorder as one index;
# 4. show when attention needs token order;
# 5. write a check that rejects every broken gather.
#
# {glossary: rank, collective; token, row; shard; slot; cp_size, cp_rank; block; per_rank_actual_token; max_rank_len; rank order; token order; provenance; layout; mutant; pass}
#
# In figures of rows and ranks, **a colour is a rank**, **hatching is padding**, and **red is wrong**. Other figures
# have a legend.
#
# Most sections follow the same loop: **predict** a number, **run** the cell, and **compare**. To see a question, run
# its `lesson.predict` cell unchanged. Then put your number in place of `...`, and run it again. A wrong guess costs
# nothing, and can make the explanation easier to remember. A guess that is close counts as right; how close depends on
# the question. The cell below each exercise checks your solution, and hints are folded below it. Your results are kept
# until the kernel restarts.

# %% connect tags=["nbval-ignore-output"] budget_s=60
import cpkit
from cpkit_lessons import padding as lesson

lesson.explain_missing_names()  # the error for an undefined name then says what to run first
lab = cpkit.connect()
world = lesson.begin(lab)

# %% connect-text [markdown]
# The cell above connected to worker processes that were already running, or started four with `torchrun`. These workers
# are the ranks. The notebook itself is not a rank: it sends requests to the workers over a socket. If the notebook
# started the workers, they stop when its kernel stops.
#
# `cp` below is the number of ranks in each gather: 2, 4 or 8, whichever is the largest group that the workers can form.
# To use 2 or 8 ranks, start JupyterLab with `make lab NPROC=2` or `make lab NPROC=8`. If you started it in another way,
# stop the workers in a terminal (`./launch_workers.sh stop`), start others (`./launch_workers.sh --nproc 2`), and run
# all cells again. The outputs that are saved in this file come from 4 ranks.

# %% setup
import torch
from cpkit.layout import prepare_context_parallel_metadata
from cpkit_lessons import figures

cp = world.cp_size

# %% s1 [markdown]
# ## 1. Who owns token t?
#
# For a gather, every rank must be able to compute where each row is. The scheduler of a serving engine selects the
# sequences of each batch, and every rank derives the place of each row from their lengths alone, without communication.
#
# Take one sequence with 6 tokens per rank, for example 24 tokens over 4 ranks. A *strategy* assigns each token to a
# rank:
#
# - **zigzag** cuts the sequence into 2·cp blocks. Rank r owns block r and its mirror image, block 2·cp−1−r.
# - **interleave** assigns token t to rank t mod cp.
# - **contiguous** cuts the sequence into cp runs of consecutive tokens, and assigns one run to each rank.

# %% owner-predict
lesson.predict("owner", ...)

# %% ownership
strategies = ("zigzag", "interleave", "contiguous")
length = 6 * cp
layouts = {name: prepare_context_parallel_metadata([length], cp, name) for name in strategies}
figures.show(figures.ownership_strip(list(layouts.values())))

# %% owner-reveal
asked = 3 * cp + 5  # the token in question
lesson.reveal("owner", int(layouts["zigzag"].owners()[asked]))

# %% bijection-text [markdown]
# Under every strategy, each token has exactly one owner. `rank_rows(rank)` lists the tokens of a rank in the order in
# which the rank stores them. The lists of all ranks together are a permutation of the tokens.

# %% bijection
for name, each in layouts.items():
    held = [each.rank_rows(rank).tolist() for rank in range(cp)]
    print(f"{name:10}  rank 0 holds {held[0]}")
    owned = [token for row in held for token in row]
    assert sorted(owned) == list(range(length)), "every token exactly once"

# %% e1-task [markdown]
# ### Exercise 1 · Who owns token t?
#
# **Goal** Write `owner`, which returns the rank that owns a token of one zigzag sequence. The sequence has at least
# 2·cp tokens, and its length need not be divisible by 2·cp.
#
# **Example** 9 tokens over 2 ranks form blocks of 3, 2, 2 and 2 tokens: the first `9 % 4` blocks have one token more.
# Tokens 0, 1 and 2 are in block 0, so `owner(2, 9, 2)` is 0. Token 3 is in block 1, so `owner(3, 9, 2)` is 1. Token 8
# is in block 3, the mirror image of block 0, so `owner(8, 9, 2)` is 0.
#
# **About** 7 minutes, ★★☆


# %% e1
def owner(token, length, cp_size):
    """Return the rank that owns a token of a zigzag sequence of `length` tokens."""
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


# %% e1-mutant-longer-blocks-last
def owner(token, length, cp_size):
    size, longer = divmod(length, 2 * cp_size)
    edge = (2 * cp_size - longer) * size
    block = token // size if token < edge else 2 * cp_size - longer + (token - edge) // (size + 1)
    return min(block, 2 * cp_size - 1 - block)


# %% e1-mutant-mirror-off-by-one
def owner(token, length, cp_size):
    size, longer = divmod(length, 2 * cp_size)
    edge = longer * (size + 1)
    block = token // (size + 1) if token < edge else longer + (token - edge) // size
    return block if block < cp_size else 2 * cp_size - block


# %% e1-help [markdown]
# Answer two questions, one after the other. Which block contains the token? Which rank owns that block?
#
# ---
# `divmod(length, 2 * cp_size)` returns the size of a block, and how many blocks have one token more. The longer
# blocks come first. The first token after them is `longer * (size + 1)`, the edge.
#
# ---
# Before that edge the block is `token // (size + 1)`. From the edge on, the block is `longer` plus the number of
# whole blocks of `size` tokens between the edge and the token. The owner is the smaller of `block` and its mirror image
# `2 * cp_size - 1 - block`.
#
# ---
# **Why** Block b and its mirror image 2·cp−1−b belong to the same rank, and the smaller of the two numbers is that
# rank.
#
# **Another way** Build a table of owners: repeat each entry of `[0, 1, …, cp−1, cp−1, …, 1, 0]` once per token of its
# block. Then look the token up in the table. Real systems do something similar: SGLang, a serving engine, stores the
# block sizes as `split_list`.

# %% s2 [markdown]
# ## 2. Why zigzag?
#
# Why would an engine choose such a complicated order? The reason is that attention is causal. Token t attends to t + 1
# keys, so late tokens cost more than early ones. Ranks with equally many tokens can have very different amounts of
# work, and the slowest rank sets the time.

# %% work-predict
lesson.predict("work", ...)

# %% work
work = {
    name: [int((layout.rank_rows(rank) + 1).sum()) for rank in range(cp)]
    for name, layout in layouts.items()
}
assert len(set(work["zigzag"])) == 1, "zigzag pairs an early block with a late one"
figures.show(figures.work_bars(work))

# %% work-reveal
lesson.reveal("work", work["contiguous"][-1] / work["contiguous"][0])

# %% work-text [markdown]
# All ranks wait for the slowest one. Zigzag pairs each early block with a late one, so all ranks finish at almost the
# same time. Interleave is nearly balanced too, and the balance improves with the length of the sequence.
#
# Zigzag is the usual default because a rank holds at most two runs of consecutive tokens per sequence, however long the
# sequence is. So two copies per sequence are enough to move a rank's rows, and two attention calls per sequence are
# enough for its queries: one for each run. With interleave, each token is a run of its own. PyTorch's context
# parallelism calls the same idea the head-tail balancer, and requires a length that is divisible by 2·cp. `contiguous`
# keeps neighbouring tokens on one rank, at the price of unbalanced work (the serving engine SGLang discusses it in
# sglang#34059, which was open in November 2026).

# %% e2-task [markdown]
# ### Exercise 2 · Count the keys
#
# **Goal** Write `keys_seen` for a batch. `tokens` holds the tokens of one rank, numbered through the flattened batch:
# all sequences, one after the other. `lengths[i]` is the number of tokens in sequence i. Each token attends to itself
# and to all earlier tokens **of its own sequence**.
#
# **Example** With `lengths` [3, 2], tokens 0, 1, 2 are one sequence, and tokens 3, 4 another. A rank that holds tokens
# 1 and 3 attends to 2 keys (0 and 1) plus 1 key (3 alone), so `keys_seen(tensor([1, 3]), [3, 2])` is 3.
#
# **About** 4 minutes, ★☆☆


# %% e2
def keys_seen(tokens, lengths):
    """Return the number of keys that these tokens attend to, as an int."""
    # >>> your code
    #: return int((tokens + 1).sum())
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    sequence = torch.searchsorted(ends, tokens, right=True)
    return int((tokens - starts[sequence] + 1).sum())
    # <<<


# %% e2-check
lesson.check_keys_seen(keys_seen)


# %% e2-mutant-forgets-itself
def keys_seen(tokens, lengths):
    ends = torch.tensor(lengths).cumsum(0)
    sequence = torch.searchsorted(ends, tokens, right=True)
    return int((tokens - (ends - torch.tensor(lengths))[sequence]).sum())


# %% e2-mutant-counts-tokens
def keys_seen(tokens, lengths):
    return len(tokens)


# %% e2-mutant-edge-belongs-to-the-sequence-before
def keys_seen(tokens, lengths):
    ends = torch.tensor(lengths).cumsum(0)
    sequence = torch.searchsorted(ends, tokens).clamp(max=len(lengths) - 1)
    return int((tokens - (ends - torch.tensor(lengths))[sequence] + 1).sum())


# %% e2-help [markdown]
# The code given in the cell is right for a batch of one sequence. At which index does the second sequence start?
#
# ---
# The position of a token in its sequence is its index minus the start of the sequence. The token attends to that many
# keys, plus one.
#
# ---
# `ends = torch.tensor(lengths).cumsum(0)`, `starts = ends - torch.tensor(lengths)`, and `torch.searchsorted(ends,
# tokens, right=True)` returns the sequence that contains each token.
#
# ---
# **Why** `right=True` matters: a token whose index equals an end is the *first* token of the next sequence.
#
# **Another way** `torch.cat([torch.arange(1, n + 1) for n in lengths])[tokens].sum()` lists the number of keys of every
# token, selects those of the rank's tokens, and adds them up. It is shorter, but it needs memory for the whole batch.

# %% s3 [markdown]
# ## 3. Why pad?
#
# A real batch is ragged: its sequences have different lengths. Here are two sequences, of 13 and 9 tokens (25 and 17
# tokens if you run 8 ranks). Zigzag cannot spread them evenly, so some ranks hold more rows than others. Why not gather
# shards of different sizes?
#
# Such gathers exist. MPI has `MPI_Allgatherv`, and torch's `all_gather` accepts a list of tensors of different lengths.
# But the all-gather of NCCL, NVIDIA's library of collectives, takes one size for all ranks. For an uneven list torch
# therefore runs one broadcast per rank (`ProcessGroupNCCL.cpp`). Those broadcasts cannot use NCCL's fastest kernels
# (GPU programs). These need *symmetric memory*, in which peers can access each other's buffers directly (notebook 2).
# So the usual solution is to pad: every rank extends its shard to the length of the longest one.

# %% waste-predict
lesson.predict("waste", ...)

# %% padding
batch = lesson.ragged(cp)
layout = prepare_context_parallel_metadata(batch, cp)
print("tokens:              ", batch)
print("rows each rank holds:", list(layout.per_rank_actual_token))
print("padded to:           ", layout.max_rank_len[0])
figures.show(figures.padding_grid(layout))

# %% waste-reveal
slots = sum(layout.max_rank_len)
lesson.reveal("waste", (slots - sum(batch)) / slots)

# %% waste-text [markdown]
# The wasted fraction depends on the batch. A few long sequences waste almost nothing, and many short ones can waste a
# lot. Zigzag cannot split a sequence of fewer than 2·cp tokens. SGLang does not split a batch that contains such a
# sequence.

# %% waste
batches = [[32768], [4097], [4097, 812, 95], [17] * 8, [9] * 4]
figures.show(figures.waste_map(batches, cp_sizes=[1, 2, 4, 8]))

# %% trap-text [markdown]
# ### The formula that comes to mind first
#
# `ceil(total / cp)` looks like the right padded length: spread the tokens evenly, and round up. Up to version 0.5.12,
# SGLang used exactly this formula in `cp_all_gather_reorganized_into_tensor_kv_cache`. That is the function that
# `cpkit`, the library of these notebooks, rebuilds. Now take 16 sequences of 4097 tokens each.

# %% cut-predict
lesson.predict("cut", ...)

# %% trap
many = prepare_context_parallel_metadata([4097] * 16, cp)
formula = -(-many.total_tokens // cp)
print("rows each rank holds:", list(many.per_rank_actual_token))
print("ceil(total / cp):    ", formula)
assert formula < max(many.per_rank_actual_token)

# %% cut-reveal
lesson.reveal("cut", max(many.per_rank_actual_token) - formula)

# %% e3-task [markdown]
# ### Exercise 3 · The padded length
#
# **Goal** Write `padded_len`, which returns the number of rows in each rank's padded shard, for zigzag. This number
# must be large enough for the rank with the most rows, and not larger. Each sequence has at least 2·cp_size tokens.
# Every rank must compute the same answer, so the function may use only what is available on all ranks: the lengths and
# `cp_size`.
#
# **Example** `padded_len([9], 2)` is 5. The blocks have 3, 2, 2 and 2 tokens, so rank 0 holds 3 + 2 rows, and rank 1
# holds 2 + 2. `padded_len([4097] * 16, 4)` is 16400.
#
# **About** 6 minutes, ★★☆


# %% e3
def padded_len(lengths, cp_size):
    """Return the number of rows of every rank's padded shard: the maximum over ranks."""
    # >>> your code
    #: return -(-sum(lengths) // cp_size)
    held = [0] * cp_size
    for length in lengths:
        size, longer = divmod(length, 2 * cp_size)
        for block in range(2 * cp_size):
            held[min(block, 2 * cp_size - 1 - block)] += size + (block < longer)
    return max(held)
    # <<<


# %% e3-check
lesson.check_padded_len(padded_len)


# %% e3-mutant-rank-0-is-longest
def padded_len(lengths, cp_size):
    blocks = 2 * cp_size
    return sum(2 * (n // blocks) + (n % blocks > 0) + (n % blocks == blocks) for n in lengths)


# %% e3-mutant-round-up-each-sequence
def padded_len(lengths, cp_size):
    return sum(-(-n // cp_size) for n in lengths)


# %% e3-mutant-round-up-each-block
def padded_len(lengths, cp_size):
    return sum(2 * -(-n // (2 * cp_size)) for n in lengths)


# %% e3-help [markdown]
# `ceil` is right for one sequence. What goes wrong when *every* sequence has one token too many?
#
# ---
# The extra tokens do not spread evenly, because in every sequence they go to the first blocks. So first add up the
# rows of each rank, and take the maximum at the end.
#
# ---
# Start with a list of `cp_size` zeros. For each sequence, add the size of each of its 2·cp blocks to the owner of that
# block. Return the maximum.
#
# ---
# **Why** `ceil(total / cp)` is the mean over the ranks, rounded up, and the rank with the most rows can hold more
# than that. And rank 0 does not always hold the most rows: with 5 extra tokens over 8 blocks, the *last* rank owns two
# long blocks.
#
# **Another way** Round each sequence up separately: `sum(ceil(n / cp))`. That is always large enough and quick to
# compute, but it wastes slots when two sequences have their extra tokens on different ranks. SGLang has taken the
# maximum over ranks since version 0.5.13.
#
# **When to pad even more** NCCL's ordinary all-gather is slower when the bytes per rank are not a multiple of 16
# (pytorch#195450). If the bytes of one row are not a multiple of 16, round `max_rank_len` up until the bytes per rank
# are a multiple of 16.

# %% s4 [markdown]
# ## 4. The real gather, stage by stage
#
# What does a serving engine actually do with these shards in each layer? In the cell after the question, the workers
# run such a gather. `algorithm="padded"` is the classic pipeline. Every row carries a *stamp*: its round (the number of
# the gather), rank, sequence and token. The workers compare every byte of the result with the stamp that belongs there.
# They also return what each buffer holds along the way, beginning with the shards.

# %% passes-predict
lesson.predict("passes", ...)

# %% gather
gathered = lab.gather(batch, cp_size=cp, algorithm="padded", round=7)
assert gathered.verified
assert gathered.checked_rows >= sum(batch)
print("buffers of padded:", " → ".join(gathered.stages))

# %% passes-reveal
copies = [stage for stage in gathered.stages if stage != "shard"]
lesson.reveal("passes", len(copies))

# %% shard-text [markdown]
# ### Before the gather: the shards
#
# Each rank holds its own rows and no others. Each box of the figure is one row, labelled `sequence:token`. Look at rank
# 0: it stores its first block of every sequence, and then its second block of every sequence.

# %% shard
figures.show(figures.stage_grid(gathered, ["shard"]))

# %% pad-text [markdown]
# ### Stage 1: pad
#
# Each rank that holds fewer than `max_rank_len` rows copies them into a buffer of that length, and fills the rest with
# zeros. A rank without padding sends its shard as it is: the figure shows it for comparison, but no row is copied
# there.

# %% pad
figures.show(figures.stage_grid(gathered, ["pad"]))
pads = [int((gathered.stage("pad", rank)[:, 1] < 0).sum()) for rank in range(cp)]
assert pads == [gathered.max_rank_len - rows for rows in gathered.per_rank_actual_token]

# %% wire-text [markdown]
# ### Stage 2: the wire
#
# The collective concatenates the buffers of all ranks. Afterwards every rank has the same large buffer, including the
# padding. We call this stage *the wire*, because here the rows cross from one rank to another.

# %% slot-predict
lesson.predict("slot", ...)

# %% wire
figures.show(figures.stage_grid(gathered, ["wire"], rank=0))
wire = gathered.stage("wire", 0)
assert len(wire) == cp * gathered.max_rank_len
assert all((gathered.stage("wire", rank) == wire).all() for rank in range(cp))

# %% slot-reveal
lesson.reveal("slot", int(((wire[:, 2] == 1) & (wire[:, 3] == 0)).argmax()))

# %% strip-text [markdown]
# ### Stage 3: strip
#
# One copy removes the padding. The remaining rows are in *rank order*: all rows of rank 0, then all rows of rank 1, and
# so on.

# %% strip
figures.show(figures.stage_grid(gathered, ["strip"], rank=0))
strip_rows = gathered.stage("strip", 0)
assert (strip_rows == wire[wire[:, 1] >= 0]).all(), "strip drops the padding and nothing else"

# %% reorder-text [markdown]
# ### Stage 4: reorder
#
# A second copy puts the rows in *token order*: sequence 0 from its first token to its last, then sequence 1. Attention
# reads this result.

# %% reorder
figures.show(figures.stage_grid(gathered, ["reorder"], rank=0))
reorder = gathered.stage("reorder", 0)
wanted = [(sequence, token) for sequence, n in enumerate(batch) for token in range(n)]
assert reorder[:, 2:].tolist() == [list(place) for place in wanted]
assert (reorder[:, 0] == 7).all(), "all rows belong to round 7"

# %% e4-task [markdown]
# ### Exercise 4 · Strip the padding
#
# **Goal** Write `strip`, which removes the padding from the wire buffer and returns the rows in rank order. `wire` is
# `[cp · max_rank_len, heads, head_dim]`. The rows of rank r begin at `r · max_rank_len`, and only the first
# `per_rank_actual_token[r]` of them are real. Assume that the padding contains arbitrary bytes, so that you cannot
# recognize it by its contents: `padded` fills it with zeros, but `padded_symm` (notebook 2) leaves it uninitialized.
# The check fills it with *poison*, a pattern that no row contains.
#
# **Example** Let `wire` hold the rows a b · c d e, where · is padding. With `per_rank_actual_token` [2, 3] and
# `max_rank_len` 3, the result is a b c d e.
#
# **About** 4 minutes, ★☆☆


# %% e4
def strip(wire, per_rank_actual_token, max_rank_len):
    """Drop the padding of every rank: `[total_tokens, heads, head_dim]` in rank order."""
    # >>> your code
    #: return wire
    chunks = wire.split(max_rank_len)
    return torch.cat([c[:rows] for c, rows in zip(chunks, per_rank_actual_token)])
    # <<<


# %% e4-check
lesson.check_strip(strip)


# %% e4-mutant-drops-zeros
def strip(wire, per_rank_actual_token, max_rank_len):
    return wire[(wire != 0).flatten(1).any(1)]


# %% e4-mutant-cuts-at-the-front
def strip(wire, per_rank_actual_token, max_rank_len):
    chunks = wire.split(max_rank_len)
    return torch.cat([c[len(c) - rows :] for c, rows in zip(chunks, per_rank_actual_token)])


# %% e4-mutant-cuts-only-at-the-end
def strip(wire, per_rank_actual_token, max_rank_len):
    return wire[: sum(per_rank_actual_token)]


# %% e4-mutant-keeps-the-last-round
def strip(wire, per_rank_actual_token, max_rank_len, kept={}):
    key = (tuple(per_rank_actual_token), max_rank_len)
    if key not in kept:
        chunks = wire.split(max_rank_len)
        kept[key] = torch.cat([c[:rows] for c, rows in zip(chunks, per_rank_actual_token)])
    return kept[key]


# %% e4-help [markdown]
# You know where the rows of each rank begin, and how many are real. You need nothing else.
#
# ---
# The real rows of rank r are `wire[r * max_rank_len : r * max_rank_len + per_rank_actual_token[r]]`.
#
# ---
# `wire.split(max_rank_len)` returns one view per rank. Cut each view with `[:rows]`, and join all of them with one
# `torch.cat`.
#
# ---
# **Why** Views copy no data, so all the slicing moves no bytes, and the single `cat` is one kernel and one pass over
# the data. A loop that copies rank by rank writes the same bytes with cp kernels.
#
# **Another way** Use `wire[mask]`, where `mask[r * max_rank_len + i]` is `i < per_rank_actual_token[r]`. It moves the
# same bytes. But a boolean index makes the CPU wait for the GPU, because the size of the result is unknown until the
# mask has been counted.

# %% s5 [markdown]
# ## 5. Strip and reorder are one permutation
#
# Strip and reorder look like two operations, and each costs a pass over all rows in every layer. Could one pass do
# both? After the strip, row i holds the token `rank_order[i]`. The inverse permutation, `token_order`, says which row
# holds each token.

# %% permutation
token_order = layout.token_order.numpy()
print("rank order: ", layout.rank_order.tolist())
print("its inverse:", token_order.tolist())
assert (strip_rows[token_order] == reorder).all(), "x[token_order] is the whole reorganization"
assert (layout.rank_order[layout.token_order] == torch.arange(sum(batch))).all()

# %% permutation-text [markdown]
# SGLang keeps several lists for this purpose (`split_list`, `cp_reverse_index`, `reverse_split_len`). All of them
# follow from one function, `rank_rows`. Zigzag, interleave and contiguous differ only in that function. So the same
# test applies to all three strategies: the lists that `rank_rows` returns for all ranks, one after the other, must be a
# permutation of the tokens.

# %% e5-task [markdown]
# ### Exercise 5 · One index for strip and reorder
#
# **Goal** Write `gather_index`, so that `wire[gather_index(...)]` removes the padding and returns the rows in token
# order in one step. `rank_rows` is a list of tensors, one per rank: the tokens that the rank holds, in the order in
# which it stores them.
#
# **Example** Rank 0 holds tokens 0 and 3, rank 1 holds tokens 1, 2 and 4, and both are padded to 3 rows. The slots of
# the wire then hold tokens 0 3 · 1 2 4. Token 0 is in slot 0, token 1 in slot 3, token 2 in slot 4, token 3 in slot 1,
# and token 4 in slot 5, so the index is [0, 3, 4, 1, 5].
#
# **About** 8 minutes, ★★☆


# %% e5
def gather_index(rank_rows, max_rank_len):
    """Return the slot of the wire's buffer that holds token 0, 1, 2, …: int64 `[total_tokens]`."""
    # >>> your code
    #: return torch.cat(rank_rows)
    slots = [
        rank * max_rank_len + torch.arange(len(tokens)) for rank, tokens in enumerate(rank_rows)
    ]
    return torch.cat(slots)[torch.cat(rank_rows).argsort()]
    # <<<


# %% e5-check
lesson.check_gather_index(gather_index)


# %% e5-mutant-no-inverse
def gather_index(rank_rows, max_rank_len):
    slots = [
        rank * max_rank_len + torch.arange(len(tokens)) for rank, tokens in enumerate(rank_rows)
    ]
    return torch.cat(slots)[torch.cat(rank_rows)]


# %% e5-mutant-forgets-the-padding
def gather_index(rank_rows, max_rank_len):
    return torch.cat(rank_rows).argsort()


# %% e5-mutant-only-strips
def gather_index(rank_rows, max_rank_len):
    slots = [
        rank * max_rank_len + torch.arange(len(tokens)) for rank, tokens in enumerate(rank_rows)
    ]
    return torch.cat(slots)


# %% e5-help [markdown]
# Write two lists of the same length, rank by rank: the *slot* of each row, and the *token* in that slot.
#
# ---
# The slots of a rank are `rank * max_rank_len + 0, 1, 2, …`. The tokens are `torch.cat(rank_rows)`. You want the slots
# sorted by token.
#
# ---
# `slots[tokens.argsort()]`: the `argsort` of a permutation is its inverse.
#
# ---
# **Why** `x[a][b]` equals `x[a[b]]`. So two passes over the rows become one pass over the rows, and one pass over an
# index of 8 bytes per row. That index is 144 to 512 times smaller than the rows of the three models in section 8. It
# depends only on the lengths, so all layers share it.
#
# **Another way** Scatter instead of sorting: `index = torch.empty(total, dtype=torch.int64); index[tokens] = slots`.
# The index is the same. Here `tokens` gives the *destination* of each slot. The sort above computes the *source* of
# each token. The algorithm `direct` of section 8 also scatters: each rank stores its rows at their destinations in the
# memory of every peer.

# %% s6 [markdown]
# ## 6. Does the order matter?
#
# The reorder costs a full pass. Can an engine skip it, and let attention read rank order? Attention is a weighted sum
# over keys, and a sum does not depend on the order of its terms.

# %% order-predict
lesson.predict("order", ...)

# %% attention
from torch.nn.functional import scaled_dot_product_attention

delivered = lab.gather(length, cp_size=cp, algorithm="padded").stage("strip", 0)
order = torch.tensor(delivered[:, 3])  # tokens in rank order, as the workers delivered them
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, length, 8, dtype=torch.float64)


def outputs_right(**mask):
    right = scaled_dot_product_attention(q, k, v, **mask)
    got = scaled_dot_product_attention(q, k[:, order], v[:, order], **mask)
    return (got - right).abs().amax((0, 2)) < 1e-12


# %% attention-figure
right = outputs_right(is_causal=True)
assert outputs_right().all(), "without a mask, the order does not matter"
tokens = figures.token_line(layouts["zigzag"])
line = figures.Line("output of token", tokens, wrong=~right.numpy())
figures.show(
    figures.draw_lines(
        [line],
        title="Causal attention over K and V in rank order: most outputs are wrong",
        subtitle="✗: the output differs from that of a single device; colour: owner of the token",
        alt=f"{int(right.sum())} of {length} outputs are right: "
        f"tokens {right.nonzero().flatten().tolist()}.",
        axis_title="token (query)",
    )
)

# %% order-reveal
lesson.reveal("order", int(right.sum()))

# %% order-text [markdown]
# Nothing crashed, and every shape was right. That is the danger of a wrong order: no error reports it. Without a mask,
# for example when a single token is decoded, the order does not matter. With a causal mask or a sliding window it does.
# Rank order usually does not disturb the position encoding: the rotary embedding (RoPE) is applied before the keys are
# cached, so each key already contains its position.

# %% e6-task [markdown]
# ### Exercise 6 · Context-parallel attention
#
# **Goal** Write the attention of one rank: its own queries against all gathered keys. `q` is `[heads, rows, dim]`, the
# rows of the rank. `k` and `v` are `[heads, total, dim]`, in token order. `tokens[i]` is the token in row i. Use
# `scaled_dot_product_attention(q, k, v, attn_mask=...)`; its mask is True where a query may attend to a key.
#
# **Example** With 4 tokens over 2 ranks and zigzag, rank 0 holds tokens 0 and 3. Its mask has the rows `1 0 0 0` and `1
# 1 1 1`.
#
# **About** 5 minutes, ★★☆


# %% e6
def cp_attention(q, k, v, tokens):
    """Return the causal attention of a rank's rows over all K and V: `[heads, rows, dim]`."""
    # >>> your code
    #: return scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.arange(k.shape[1]) <= tokens[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # <<<


# %% e6-check
lesson.check_cp_attention(cp_attention)


# %% e6-mutant-no-mask
def cp_attention(q, k, v, tokens):
    return scaled_dot_product_attention(q, k, v)


# %% e6-mutant-not-itself
def cp_attention(q, k, v, tokens):
    mask = torch.arange(k.shape[1]) < tokens[:, None]
    mask[:, 0] = True
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


# %% e6-mutant-row-for-token
def cp_attention(q, k, v, tokens):
    mask = torch.arange(k.shape[1]) <= torch.arange(len(tokens))[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


# %% e6-mutant-last-rows-of-all
def cp_attention(q, k, v, tokens):
    rows, total = len(tokens), k.shape[1]
    mask = torch.arange(total) <= torch.arange(total - rows, total)[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


# %% e6-help [markdown]
# `is_causal=True` compares row numbers: row i attends to keys 0 to i. Which number should it compare instead?
#
# ---
# Row i holds token `tokens[i]`. It may attend to key j if `j <= tokens[i]`.
#
# ---
# `torch.arange(total) <= tokens[:, None]` is the mask, `[rows, total]`.
#
# ---
# **Why** The gathered K and V equal those of a single device. So with the right mask, each output equals that of a
# single device too. The mask must use token numbers, because row i of a rank is not always token i. A kernel without a
# general mask is called twice instead, once per block of the rank. SGLang's zigzag does this with `kv_len_prev` and
# `kv_len_next`.
#
# **Another way** Leave K and V in rank order, and permute the *mask*: `order <= tokens[:, None]`. PyTorch's
# FlexAttention (attention with a programmable mask) does this: it rewrites the indices of the mask, and does not
# reorder the rows. It requires a kernel that accepts any mask.

# %% s7 [markdown]
# ## 7. Bug hunt: a check that detects every fault
#
# How would you notice a broken gather in production? Wrong rows raise no error: they just make the answers of the model
# worse. So the test has to find them. Here are ten broken gathers, or *mutants*, by the names in the table below:
# - `two ranks exchanged`, `two neighbours exchanged`: rows are at each other's place;
# - `rank order: reorder forgotten`: the rows are still in rank order;
# - `stale: one rank's previous round`: the rows of one rank are left over from the previous round;
# - `padding in place of a row`, `a row twice`: one row is missing, and padding or a copy of its neighbour stands in its
#   place;
# - `written by a rank that is not the owner`: the stamps of one rank's rows name another rank;
# - `wrong sequence number`: the stamps of the last sequence contain a number that no sequence has;
# - `the last row lost`, `slots after the end`: the result is too short or too long.
#
# The table applies four common checks to each of them. `lengths only` counts the slots. `one constant per rank`
# compares the rank in each slot. `the same set of tokens` compares sequences and tokens, but not their order, and
# `tokens in order` compares their order too. `✓ killed` means that the check rejects the mutant, and `alive` that it
# accepts it.

# %% survivors-predict
lesson.predict("survivors", ...)

# %% kills
table = lesson.kill_table(layout, round_=7)
alive = (table == "alive").sum()
assert not (table == "✓ killed").all().any(), "no check rejects all ten"
table

# %% survivors-reveal
lesson.reveal("survivors", int(alive["lengths only"]))

# %% survivors-text [markdown]
# NCCL's own example of symmetric memory, and several tests in PyTorch, use `one constant per rank`: their rows hold
# nothing but the number of their rank. This check does not detect a stale round, or two exchanged rows of one rank.
# Read each column of the table: every check accepts some of the faults.

# %% e7-task [markdown]
# ### Exercise 7 · Write the check that rejects all mutants
#
# **Goal** Write `accepts`. `got` is a list with one tuple `(round, rank, sequence, token)` per slot, decoded from the
# rows (for padding, all four are -1). `token` is the position within its sequence. `lengths` are the numbers of tokens
# in each sequence, `owners[i]` is the rank that owns token i of the flattened batch, and `round_` is the current round.
# Return True for a correct gather, and False for every broken one.
#
# **Example** For `lengths` [2], `owners` [0, 1] and round 5, only `[(5, 0, 0, 0), (5, 1, 0, 1)]` is right.
#
# **About** 6 minutes, ★★☆


# %% e7
def accepts(got, lengths, owners, round_):
    """Return whether a gather is right in every slot, and has no other slots."""
    # >>> your code
    #: return len(got) == sum(lengths)
    places = [(sequence, token) for sequence, n in enumerate(lengths) for token in range(n)]
    wanted = [(round_, rank, *place) for rank, place in zip(owners, places)]
    return got == wanted
    # <<<


# %% e7-check
lesson.check_accepts(accepts)


# %% e7-mutant-refuses-all
def accepts(got, lengths, owners, round_):
    return False


# %% e7-mutant-a-set-of-tokens
def accepts(got, lengths, owners, round_):
    places = [(s, token) for s, n in enumerate(lengths) for token in range(n)]
    wanted = {(round_, rank, *place) for rank, place in zip(owners, places)}
    return len(got) == len(wanted) and set(got) == wanted


# %% e7-mutant-ignores-the-round
def accepts(got, lengths, owners, round_):
    places = [(s, token) for s, n in enumerate(lengths) for token in range(n)]
    return [g[1:] for g in got] == [(rank, *place) for rank, place in zip(owners, places)]


# %% e7-mutant-ignores-the-writer
def accepts(got, lengths, owners, round_):
    places = [(s, token) for s, n in enumerate(lengths) for token in range(n)]
    return [(g[0], *g[2:]) for g in got] == [(round_, *place) for place in places]


# %% e7-mutant-stops-at-the-shorter
def accepts(got, lengths, owners, round_):
    places = [(s, token) for s, n in enumerate(lengths) for token in range(n)]
    wanted = [(round_, rank, *place) for rank, place in zip(owners, places)]
    return all(g == w for g, w in zip(got, wanted))


# %% e7-mutant-ignores-the-slots-after-the-end
def accepts(got, lengths, owners, round_):
    places = [(s, token) for s, n in enumerate(lengths) for token in range(n)]
    wanted = [(round_, rank, *place) for rank, place in zip(owners, places)]
    return got[: sum(lengths)] == wanted


# %% e7-mutant-ignores-the-sequence
def accepts(got, lengths, owners, round_):
    wanted = [
        (round_, rank, token)
        for rank, token in zip(owners, (token for n in lengths for token in range(n)))
    ]
    return [(g[0], g[1], g[3]) for g in got] == wanted


# %% e7-help [markdown]
# Do not look for faults. Describe the right result completely, and compare.
#
# ---
# Slot i must hold token i of the flattened batch: its sequence, its position in that sequence, its owner, and this
# round.
#
# ---
# Build the list `wanted` of `(round_, owner, sequence, token)` in token order, and return `got == wanted`.
#
# ---
# **Why** A check that lists faults detects only the faults on its list. A check that describes the right result also
# detects faults that you did not think of. It needs rows that identify themselves: a stamp in every row, and a known
# pattern (*poison*) wherever no rank should write.
#
# **Another way** Compare the raw bytes: `torch.equal(rows, formula(round_, rank, token))`, as `cpkit.provenance` does.
# This also detects wrong bytes in the middle of a row. Never compare with another collective, because both may be wrong
# in the same way.

# %% s8 [markdown]
# ## 8. Count the bytes
#
# The padded gather writes each row several times. Does it have to? Every rank can compute the permutation *before* any
# row moves. So it can store each of its rows directly at its final position in the output of every peer. That needs no
# padding, no strip and no reorder. The algorithm is called `direct`. Its only pass is the wire, so the buffer `wire` is
# already the result.

# %% direct
direct = lab.gather(batch, cp_size=cp, algorithm="direct", round=7)
last = direct.stages[-1]
print("buffers of direct:", " → ".join(direct.stages))
assert (direct.stage(last, 0) == reorder).all(), "the same bytes, from one pass"
figures.show(figures.stage_grid(direct))

# %% e8-task [markdown]
# ### Exercise 8 · The bytes of a padded gather
#
# **Goal** Write `bill`, which returns the bytes that are written into the buffers of *one rank* in each stage of the
# padded gather. The rank holds `rows` rows, every rank's buffer has `max_rank_len` rows, and the batch has `total`
# tokens. A rank that needs no padding does not copy in the `pad` stage.
#
# **Example** Rank 0 holds 2 rows, rank 1 holds 3, and a row has 10 bytes. Rank 0 pads (3 rows, 30 bytes), receives 2 ·
# 3 slots (60 bytes), strips (5 rows, 50 bytes), and reorders (5 rows, 50 bytes). So `bill(2, 3, 5, 2, 10)` is `{"pad":
# 30, "wire": 60, "strip": 50, "reorder": 50}`.
#
# **About** 4 minutes, ★★☆


# %% e8
def bill(rows, max_rank_len, total, cp_size, row_bytes):
    """Return the bytes written into one rank's buffers: {"pad": …, "wire": …, "strip": …, "reorder": …}."""
    # >>> your code
    #: return {"pad": 0, "wire": total * row_bytes, "strip": 0, "reorder": 0}
    padded = max_rank_len if rows < max_rank_len else 0
    slots = {"pad": padded, "wire": cp_size * max_rank_len, "strip": total, "reorder": total}
    return {stage: count * row_bytes for stage, count in slots.items()}
    # <<<


# %% e8-check
lesson.check_bill(bill)


# %% e8-mutant-always-pads
def bill(rows, max_rank_len, total, cp_size, row_bytes):
    slots = {"pad": max_rank_len, "wire": cp_size * max_rank_len, "strip": total, "reorder": total}
    return {stage: count * row_bytes for stage, count in slots.items()}


# %% e8-mutant-padding-is-free-on-the-wire
def bill(rows, max_rank_len, total, cp_size, row_bytes):
    padded = max_rank_len if rows < max_rank_len else 0
    return {"pad": padded * row_bytes} | dict.fromkeys(
        ["wire", "strip", "reorder"], total * row_bytes
    )


# %% e8-mutant-pads-only-the-missing
def bill(rows, max_rank_len, total, cp_size, row_bytes):
    missing = max_rank_len - rows
    slots = {"pad": missing, "wire": cp_size * max_rank_len, "strip": total, "reorder": total}
    return {stage: count * row_bytes for stage, count in slots.items()}


# %% e8-help [markdown]
# Go through the figures of stages 1 to 4 in section 4, and count the slots that one rank writes in each.
#
# ---
# The wire carries padding. Strip and reorder write real rows only. The pad writes the *whole* new buffer of
# `max_rank_len` slots: the rows of the shard, and zeros after them.
#
# ---
# There are `cp_size * max_rank_len` slots on the wire, `total` rows in strip and in reorder, and `max_rank_len` or 0
# rows in pad. Multiply each by `row_bytes`.
#
# ---
# **Why** After the wire, two more passes each read and write all rows. `direct` writes `total` rows once. So count
# before you tune: removing a pass that is not needed gains more than a faster kernel for it.
#
# **Another way** Count what is *read* too. Each stage reads about as many bytes as it writes, so the traffic is about
# twice as large. In the wire stage, a part of what is read is in the memory of other ranks.

# %% models-text [markdown]
# How much is that for a real model? Take three models, and one prompt of 32767 tokens over your ranks. The next cell
# computes the bytes that one token adds to the KV cache of one layer (bfloat16; the sizes are those of each model's
# `config.json`), and the bytes that the gather moves.

# %% bill-predict
lesson.predict("bill", ...)

# %% models
models = {
    "Llama 3 70B (8 KV heads)": 2 * 8 * 128 * 2,
    "Qwen3 235B (4 KV heads)": 2 * 4 * 128 * 2,
    "DeepSeek V3 (MLA latent)": (512 + 64) * 2,
}
long_prompt = prepare_context_parallel_metadata([32767], cp)
figures.show(figures.byte_bars(long_prompt, models))

# %% bill-reveal
written = figures.bill(long_prompt, row_bytes=1)
lesson.reveal("bill", sum(written.values()) / long_prompt.total_tokens)

# %% models-text-after [markdown]
# With MLA, the attention of DeepSeek, the gather moves one vector of 576 elements per token instead of K and V: a
# latent of 512 elements and a key part of 64. Its total is smaller, but the proportions are the same. Notebook 3
# measures how long it takes to move these bytes. To write into the memory of a peer, a rank needs *symmetric memory*.
# That is the subject of notebook 2.

# %% plan-text [markdown]
# ### A plan in two lines
#
# A serving engine gathers with the same lengths in every layer of a batch. Must the ranks check their arguments, and
# agree that they match, each time? A *plan* does this once, and each call then moves every row straight to its final
# place (the algorithm `direct`):
#
# ```python
# plan = plan_gather_kv([k], layout, group)  # once per batch
# (gathered,) = plan()                       # in every layer
# ```
#
# {glossary: plan}
#
# `lab.gather` makes each rank call `all_gather_kv`, cpkit's gather. With `direct`, it synchronizes twice: the ranks
# agree before any row is stored, and they wait at a barrier until all rows have arrived. The next cells start two new
# ranks beside the workers, and run the function `layers` on them. `group.size` says how many ranks there are, and
# `group.rank` (0 or 1) which of them is running the function. The function makes a plan, and `stages.record()` records
# the *steps* of one call. Some steps fill a buffer, such as `wire`. The others synchronize: `agree` is the agreement,
# and `exit` is the barrier at the end.

# %% plan-predict
lesson.predict("plan", ...)


# %% plan
def layers(group):
    import torch
    from cpkit import stages
    from cpkit.layout import prepare_context_parallel_metadata, shard
    from cpkit.plan import plan_gather_kv

    layout = prepare_context_parallel_metadata([13, 9], group.size)
    whole = torch.arange(22.0)[:, None]  # one number per token
    k = shard(whole, layout, group.rank)
    plan = plan_gather_kv([k], layout, group)  # once per batch
    k += 1000  # a layer writes its own rows into the same memory
    with stages.record() as recorder:
        (gathered,) = plan()  # in every layer
    assert (gathered == whole + 1000).all()
    return [span.stage for span in recorder.spans]


# %% plan-run
from cpkit_lessons.own_ranks import in_ranks

steps = in_ranks(layers, 2)[0]
print("steps of a call:", " → ".join(steps))

# %% plan-reveal
lesson.reveal("plan", sum(step in ("agree", "exit") for step in steps))

# %% plan-after [markdown]
# Without a plan, every call of `all_gather_kv` begins with an agreement. It also makes sure that no rank still reads
# the output that the call overwrites. How can a plan do without it? The plan has two outputs and uses them in turn, so
# call n + 1 overwrites the output of call n − 1. That is safe for two reasons. A rank may use a result only until its
# own next call, so a rank that has begun call n no longer needs the result of call n − 1. And no rank begins call n + 1
# before all ranks have arrived at the barrier at the end of call n. MPI has such gathers too, prepared once and called
# many times, and calls them persistent (`MPI_Allgatherv_init`).

# %% s9 [markdown]
# ## 9. Try it
#
# How do the stages of a gather change with the number of ranks? Move the slider, or focus it and press the arrow keys.
# Each change runs a new gather on the workers, checks every byte, and redraws the figure. The cell below the panel
# moves the slider once to cp / 2 and back, as you would. (Notebook 2 explains the algorithm `padded_symm_recv`.)

# %% stepper
from cpkit_lessons.stepper import Stepper

stepper = Stepper(lab, batch, cp_size=cp)
stepper

# %% stepper-check
stepper.wait(done=1)
stepper.cp_size.value = cp // 2  # as if you had moved the slider
stepper.wait(done=2)
stepper.cp_size.value = cp
stepper.wait(done=3)
assert len(stepper.figure.data[0].y) > 0

# %% s10 [markdown]
# ## Your results

# %% progress
lesson.progress()

# %% end [markdown]
# ## What to remember
#
# - A layout is one list of tokens per rank, and together the lists are a permutation. Padding, strip and reorder follow
#   from these lists.
# - The padded length is the *maximum over ranks*. `ceil(total / cp)` is too small for some batches.
# - Pad, wire, strip and reorder move the rows: three of them are passes over all rows, and pad copies one shard.
#   `direct` needs one pass.
# - A wrong order has the right shape. Check positions, not counts.
#
# ### Five questions
#
# Answer each question aloud before you open it.
#
# <details><summary>1. Which rank has the most work under contiguous, and why do all ranks have about the same under zigzag?</summary>
#
# The last rank has the most work, because late tokens attend to more keys. Zigzag assigns one early and one late block
# to each rank.
# </details>
# <details><summary>2. When is ceil(total / cp) right?</summary>
#
# It is always right for one sequence. For several it can be too small, because their extra tokens can belong to the
# same rank.
# </details>
# <details><summary>3. Why may a gather leave the padding uninitialized, and where must the padding be masked?</summary>
#
# A gather only copies it and drops it later. Padding must be masked where it would enter a sum, a softmax, or the
# routing of tokens to experts.
# </details>
# <details><summary>4. How many passes over the rows does x[a][b] need, and how many does x[a[b]]?</summary>
#
# `x[a][b]` needs two passes, and `x[a[b]]` needs one.
# </details>
# <details><summary>5. A test compares a new gather with NCCL's on the data torch.arange(n) + rank. Which faults does it miss?</summary>
#
# It misses a stale round, because the data are the same every time. It also misses an exchange of rows that have the
# same value on two ranks. It misses every fault that both gathers share.
# </details>
#
# ### You can now read
#
# - SGLang's `cp_utils.py` up to 0.5.18. `cp_all_gather_reorganized_into_tensor_kv_cache` is stages 1 to 3 (since 0.5.13
#   with the maximum over ranks), and `cp_all_gather_rerange_kv_cache` is all four stages. In 0.5.23 their successors
#   are `layers/cp/zigzag.py` (`_all_gather_reorganized`) and `layers/cp/interleave.py` (`_gather_interleaved_tensor`,
#   which strips and reorders with one `index_select`, as in exercise 5).
# - vLLM's `reorg_kvcache` in `v1/attention/backends/mla/common.py`: exercises 4 and 5, as a loop over sequences and
#   ranks.
# - TransformerEngine's `AttnFuncWithCPAndKVAllGather`: gather K, gather V, then `index_select`.
#
# ### An open problem
#
# In vllm#49517, #52863 and #57115 (all open in November 2026), every rank stores its rows straight into each peer's
# *paged cache*, which is a KV cache in pages that are assigned to requests. What is the permutation then, and which
# ranks must agree before a page is reused? Section 11 of notebook 2 answers both questions for one request.
#
# Next: `02_symmetric_memory.ipynb`.
