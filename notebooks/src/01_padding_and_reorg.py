# %% title [markdown]
# # 1 · Padding and reorganization
#
# A long prompt keeps one GPU busy for too long. Context parallelism cuts the sequence: every rank computes a few
# of its tokens. But attention needs the keys and values of **all** tokens. So the ranks gather the KV cache:
# pad, all-gather, strip, reorder. Here real processes do it, and you write each step.
#
# **Time** 70 minutes. **Needs** any laptop: the ranks are CPU processes. **Know before** tensors, and what a KV cache is.
#
# You will be able to
# 1. say which rank owns token *t*, and what that costs in causal attention;
# 2. compute how many rows are padding, and name the formula that gets it wrong;
# 3. write strip and reorder as one index;
# 4. show why attention needs token order;
# 5. write a check that no broken gather survives.
#
# {glossary: token, row; cp_size, cp_rank; block; per_rank_actual_token; max_rank_len; rank order; token order; provenance; mutant}
#
# In every figure **a colour is a rank**, **hatching is padding**, and **red is wrong**.
#
# Each section goes the same way: **predict** a number, **run**, **compare**. Put your number in place of `...`. A wrong
# guess costs nothing, and teaches more than none. Exercises are checked at once; hints are folded below them.

# %% connect tags=["nbval-ignore-output"] budget_s=60
import cpkit
from cpkit_lessons import padding as lesson

lesson.explain_missing_names()  # a cell that needs an earlier one then says which
lab = cpkit.connect()
world = lesson.begin(lab)

# %% connect-text [markdown]
# That found running worker processes, or started four with `torchrun`. This notebook is not one of them: it
# sends them orders over a socket. Workers that it started end with its kernel.
#
# The notebook follows the workers: `cp` below is the number of ranks of each gather. To see it with 2 or 8 ranks, start the workers
# yourself (`./launch_workers.sh stop`, then `./launch_workers.sh --nproc 2`), and run all cells again. The outputs that are
# saved in this file are those of 4 ranks.

# %% setup
import torch
from cpkit.layout import prepare_context_parallel_metadata
from cpkit_lessons import figures

cp = world.cp_size

# %% s1 [markdown]
# ## 1. Who owns token t?
#
# One sequence of 6 tokens per rank: 24 tokens over 4 ranks. A *strategy* says who owns what.
#
# - **zigzag**: cut into 2·cp blocks; rank r owns block r and block 2·cp−1−r.
# - **interleave**: token t goes to rank t mod cp.
# - **contiguous**: one block per rank.

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
# Whatever the strategy: every token has exactly one owner. `rank_rows(rank)` lists a rank's tokens. Over
# all ranks that is a permutation.

# %% bijection
for name, layout in layouts.items():
    held = [layout.rank_rows(rank).tolist() for rank in range(cp)]
    print(f"{name:10}  rank 0 holds {held[0]}")
    owned = [token for row in held for token in row]
    assert sorted(owned) == list(range(length)), "every token exactly once"

# %% e1-task [markdown]
# ### Exercise 1 · Who owns token t?
#
# **Goal** Write `owner`: the rank that owns a token of one zigzag sequence, of any length of at least 2·cp tokens.
#
# **Example** 9 tokens over 2 ranks are blocks of 3, 2, 2, 2 tokens: the first `9 % 4` blocks are one longer.
# Tokens 0, 1, 2 are block 0, so `owner(2, 9, 2)` is 0. Token 3 is in block 1: `owner(3, 9, 2)` is 1. Token 8 is in
# block 3, the mirror of block 0: `owner(8, 9, 2)` is 0.
#
# **About** 7 minutes, ★★☆


# %% e1
def owner(token, length, cp_size):
    """Rank that owns a token of a zigzag sequence of `length` tokens."""
    # >>> your code
    #: return 0
    size, longer = divmod(length, 2 * cp_size)
    edge = longer * (size + 1)  # here the longer blocks end
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
# Two questions, one after the other: which block is the token in? Whose block is that?
#
# ---
# `divmod(length, 2 * cp_size)` gives the size of a block, and how many blocks are one token longer. Those come first.
# They end at token `longer * (size + 1)`.
#
# ---
# Two cases: `token // (size + 1)` before that edge; after it `longer +` the blocks of `size` tokens since the edge.
# Then the smaller of `block` and its mirror.
#
# ---
# **Why** Block b and its mirror 2·cp−1−b belong to the same rank, and the smaller of the two *is* the rank.
#
# **Another way** List the owners once: repeat `[0, 1, …, cp−1, cp−1, …, 1, 0]` by the block sizes, and look the token up.
# That is what a real system does: SGLang keeps the block sizes as `split_list`.

# %% s2 [markdown]
# ## 2. Why zigzag?
#
# Attention is causal: token t looks at t + 1 keys. So late tokens cost more, and "the same number of tokens" is not
# "the same work".

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
# All ranks wait for the slowest. Zigzag pairs each early block with a late one, and all finish together. Interleave is
# balanced too, the better the longer the sequence. Zigzag is the default because of its long runs: a rank holds two per
# sequence, which two copies move and two attention calls read, where interleave has one run per token. PyTorch's context parallelism calls the same idea the head-tail balancer, and asks for a length that
# divides by 2·world. `contiguous` keeps neighbours together and pays with balance (open as sglang#34059).

# %% e2-task [markdown]
# ### Exercise 2 · Count the keys
#
# **Goal** Write `keys_seen` for a batch: `tokens` are a rank's rows as indices into the flattened batch, `lengths` the
# tokens of each sequence. Each token looks at itself and at what comes before it **in its own sequence**.
#
# **Example** `lengths` [3, 2] are tokens 0 1 2 and 3 4. A rank with tokens 1 and 3 looks at 2 keys (0, 1) and 1 key
# (3 alone): `keys_seen(tensor([1, 3]), [3, 2])` is 3.
#
# **About** 4 minutes, ★☆☆


# %% e2
def keys_seen(tokens, lengths):
    """Keys that the rank's tokens look at, all together: an int."""
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
# The starter is right for one sequence. In the second one, at which index does the counting begin?
#
# ---
# The place of a token in its sequence is its index minus the start of its sequence. It looks at that many keys, plus one.
#
# ---
# `ends = lengths.cumsum`, `starts = ends - lengths`, and `torch.searchsorted(ends, tokens, right=True)` says which
# sequence each token is in.
#
# ---
# **Why** `right=True` matters: the token whose index equals an end is the *first* of the next sequence.
#
# **Another way** `torch.cat([torch.arange(1, n + 1) for n in lengths])[tokens].sum()`: list the keys of every token once,
# and pick the rank's. Shorter, and it costs memory for the whole batch.

# %% s3 [markdown]
# ## 3. Why pad?
#
# A real batch is ragged. Here are two sequences, of 13 and 9 tokens (25 and 17 if you run 8 ranks). Zigzag cannot spread them
# evenly over the ranks.
#
# There are gathers for uneven sizes: `MPI_Allgatherv`, and torch's `all_gather` accepts a list of tensors of different
# lengths. But NCCL's all-gather takes one size for all ranks, so torch runs such a list as one broadcast per rank
# (`ProcessGroupNCCL.cpp`), and those do not use the symmetric kernels of an all-gather, which notebook 2 is about. So each rank
# pads to the longest.

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
# How much is wasted depends on the batch. Long sequences lose nearly nothing; many short ones lose a lot.
# Where a sequence has fewer than 2·cp tokens, zigzag can't split it at all, and SGLang does not try.

# %% waste
batches = [[32768], [4097], [4097, 812, 95], [17] * 8, [9] * 4]
figures.show(figures.waste_map(batches, cp_sizes=[1, 2, 4, 8]))

# %% trap-text [markdown]
# ### The formula that everybody writes first
#
# The padded length is `ceil(total / cp)`: spread the tokens evenly and round up. The function that this kit is about had
# exactly that in SGLang up to 0.5.12. Now take 16 sequences of 4097 tokens.

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
# **Goal** Write `padded_len`: rows that every rank needs, for zigzag. No rank may lose a row, no slot may be padding on
# all ranks. Every rank must get the same answer, so it may only use what all ranks know: the lengths and `cp_size`.
#
# **Example** `padded_len([9], 2)` is 5: blocks of 3, 2, 2, 2 tokens; rank 0 holds 3 + 2, rank 1 holds 2 + 2.
# `padded_len([4097] * 16, 4)` is 16400.
#
# **About** 6 minutes, ★★☆


# %% e3
def padded_len(lengths, cp_size):
    """Rows of every rank's padded shard: the maximum over ranks."""
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
# `ceil` is right for one sequence. What goes wrong when *every* sequence has a token too many?
#
# ---
# The odd tokens do not spread evenly: each sequence gives them to the same ranks. So sum per rank first, and take the
# maximum last.
#
# ---
# A list of `cp_size` zeros; for each sequence and each of its 2·cp blocks add the block's size to its owner; `max`.
#
# ---
# **Why** "Maximum of sums" and "sum of rounded means" are different numbers. And rank 0 is not always the longest: with 5 odd
# tokens over 8 blocks the *last* rank owns two long blocks.
#
# **Another way** Round each sequence up by itself: `sum(ceil(n / cp))`. That is safe and quick, and wastes slots
# whenever two sequences have odd tokens on different ranks. SGLang takes the maximum over ranks from 0.5.13 on.
#
# **Longer still** A payload whose bytes per rank are no multiple of 16 makes NCCL's ordinary all-gather slower
# (pytorch#195450). Where a row is no multiple of 16 bytes, round `max_rank_len` up further.

# %% s4 [markdown]
# ## 4. The real gather, stage by stage
#
# Now the workers do it. `algorithm="padded"` is the classic pipeline. Every row carries a stamp: round, rank,
# sequence, token. The workers compare every byte with the stamp that belongs there.

# %% passes-predict
lesson.predict("passes", ...)

# %% gather
gathered = lab.gather(batch, cp_size=cp, algorithm="padded", round=7)
assert gathered.verified
assert gathered.checked_rows >= sum(batch)
print("algorithm:", gathered.algorithm, "| path:", gathered.path)
print("stages:   ", " → ".join(gathered.stages))

# %% passes-reveal
copies = [stage for stage in gathered.stages if stage != "shard"]
lesson.reveal("passes", len(copies))

# %% shard-text [markdown]
# ### Before: the shards
#
# Each rank holds its own rows, and nothing else. A cell shows `sequence:token`. Look at rank 0: first its first block of
# each sequence, then its second block of each.

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
# The collective puts all buffers one after another. Every rank then has the same big buffer, with the padding
# in it.

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
# One copy drops the padding. What is left is in *rank order*.

# %% strip
figures.show(figures.stage_grid(gathered, ["strip"], rank=0))
strip_rows = gathered.stage("strip", 0)
assert (strip_rows == wire[wire[:, 1] >= 0]).all(), "strip drops the padding and nothing else"

# %% reorder-text [markdown]
# ### Stage 4: reorder
#
# One more copy puts the tokens in order: sequence 0 from its first token to its last, then sequence 1. This is
# what attention reads.

# %% reorder
figures.show(figures.stage_grid(gathered, ["reorder"], rank=0))
reorder = gathered.stage("reorder", 0)
wanted = [(sequence, token) for sequence, n in enumerate(batch) for token in range(n)]
assert reorder[:, 2:].tolist() == [list(place) for place in wanted]
assert (reorder[:, 0] == 7).all(), "all rows are of the round we asked for"

# %% e4-task [markdown]
# ### Exercise 4 · Strip the padding
#
# **Goal** Write `strip`: from the wire's buffer to rank order. `wire` is `[cp · max_rank_len, heads, head_dim]`; rank r's
# rows begin at `r · max_rank_len`, and only the first `per_rank_actual_token[r]` of them are real. Padding holds poison,
# not zeros: nothing in a row says that it is padding.
#
# **Example** `wire` of rows a b · c d e, where · is padding, with `per_rank_actual_token` [2, 3] and `max_rank_len` 3 gives
# a b c d e.
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
# You know where each rank's rows begin, and how many are real. Nothing else is needed.
#
# ---
# Rank r's real rows are `wire[r * max_rank_len : r * max_rank_len + per_rank_actual_token[r]]`.
#
# ---
# `wire.split(max_rank_len)` gives one view per rank; cut each with `[:rows]`; one `torch.cat` of all of them.
#
# ---
# **Why** Views are free, so all slices cost nothing, and the one `cat` is one kernel and one pass. A loop that copies rank
# by rank writes the same bytes with cp kernels.
#
# **Another way** `wire[mask]` with `mask[r * max_rank_len + i] = i < per_rank_actual_token[r]`. The same bytes, but a boolean
# index makes a GPU wait for the CPU: the size of the result is not known before it has run.

# %% s5 [markdown]
# ## 5. The permutation is the spec
#
# Strip and reorder look like two operations. They are one index. `rank_order[i]` is the token that stands at
# place i after the strip. Its inverse reorganizes.

# %% permutation
token_order = layout.token_order.numpy()
print("rank order: ", layout.rank_order.tolist())
print("its inverse:", token_order.tolist())
assert (strip_rows[token_order] == reorder).all(), "x[token_order] is the whole reorganization"
assert (layout.rank_order[layout.token_order] == torch.arange(sum(batch))).all()

# %% permutation-text [markdown]
# So everything that upstream keeps in lists (`split_list`, `cp_reverse_index`, `reverse_split_len`) follows from one function,
# `rank_rows`. Zigzag, interleave and contiguous differ in it and in nothing else. A test that it is a bijection tests all
# of them.

# %% e5-task [markdown]
# ### Exercise 5 · One index for strip and reorder
#
# **Goal** Write `gather_index`, so that `wire[gather_index(...)]` is in token order at once, padding gone. `rank_rows` is a
# list of tensors: the tokens that each rank holds, in its order.
#
# **Example** Rank 0 holds tokens 0 and 3, rank 1 holds 1, 2 and 4; both are padded to 3 rows. The wire's slots hold tokens
# 0 3 · 1 2 4. Token 0 is in slot 0, token 1 in slot 3, token 2 in slot 4, token 3 in slot 1: the index is [0, 3, 4, 1, 5].
#
# **About** 8 minutes, ★★☆


# %% e5
def gather_index(rank_rows, max_rank_len):
    """Slot of the wire's buffer that holds token 0, 1, 2, …: int64 `[total_tokens]`."""
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
# Two lists of the same length and in the same order, rank by rank: which *slot*, and which *token* is in it.
#
# ---
# The slots are `rank * max_rank_len + 0, 1, 2, …`. The tokens are `torch.cat(rank_rows)`. You want the slots sorted by token.
#
# ---
# `slots[tokens.argsort()]`: for a permutation, `argsort` is the inverse.
#
# ---
# **Why** `x[a][b]` is `x[a[b]]`. So two passes over the rows become one pass over the rows and one over an index of 8 bytes per
# row: 144 to 512 times smaller for the three models of section 8. The index depends on lengths only, so all layers share it.
#
# **Another way** Scatter instead of sort: `index = torch.empty(total); index[tokens] = slots`. No sorting, and the same
# thought with the arrow turned round: *where does this slot go* instead of *where does this token come from*. `direct` is that,
# across ranks.

# %% s6 [markdown]
# ## 6. Does the order matter?
#
# The reorder costs a full pass. Could attention not simply read rank order? The weights of a softmax do not care in which
# order they are summed.

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
assert outputs_right().all(), "without a mask the order is free"
tokens = figures.token_line(layouts["zigzag"])
line = figures.Line("output of token", tokens, wrong=~right.numpy())
figures.show(
    figures.draw_lines(
        [line],
        title="Causal attention over K and V in rank order: most outputs are wrong",
        subtitle="✗ differs from one device; colour: the owner of the token",
        alt=f"{int(right.sum())} of {length} outputs are right: "
        f"tokens {right.nonzero().flatten().tolist()}.",
        axis_title="token (query)",
    )
)

# %% order-reveal
lesson.reveal("order", int(right.sum()))

# %% order-text [markdown]
# Nothing crashed, and every shape was right. That is the danger: order errors are silent. Without a mask (decoding one
# token) the order is free; with a causal mask or a window it is not. Positions are no obstacle where RoPE is applied before
# the keys are cached, as it usually is: each key carries its position along.

# %% e6-task [markdown]
# ### Exercise 6 · Context-parallel attention
#
# **Goal** Write what one rank computes: its own queries against all gathered keys. `q` is `[heads, rows, dim]`, the rank's
# rows; `k` and `v` are `[heads, total, dim]` in token order; `tokens[i]` is the token of row i. Use
# `scaled_dot_product_attention(q, k, v, attn_mask=...)`; a mask is true where a query may look.
#
# **Example** 4 tokens over 2 ranks, zigzag: rank 0 holds tokens 0 and 3. Its mask has the rows `1 0 0 0` and `1 1 1 1`.
#
# **About** 5 minutes, ★★☆


# %% e6
def cp_attention(q, k, v, tokens):
    """Causal attention of a rank's rows over the gathered K and V: `[heads, rows, dim]`."""
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
# `is_causal=True` compares row numbers: row i sees keys 0 to i. Which number should be compared instead?
#
# ---
# Row i is token `tokens[i]`. It may look at key j when `j <= tokens[i]`.
#
# ---
# `torch.arange(total) <= tokens[:, None]` is the mask, `[rows, total]`.
#
# ---
# **Why** The gathered K and V are those of one device, so each output is too. Only the mask has to know that a rank's rows
# are not the first rows of the sequence. Kernels get the same from two calls with `kv_len_prev` and `kv_len_next`, one for
# each block of the rank: SGLang's zigzag does.
#
# **Another way** Leave K and V in rank order and permute the *mask*: `order <= tokens[:, None]`. PyTorch's FlexAttention
# path does that: it rewrites the indices of the mask and moves no row. It needs a kernel that takes any mask.

# %% s7 [markdown]
# ## 7. Bug hunt: a check that sees everything
#
# Here are ten broken gathers: two ranks exchanged, the reorder forgotten, a rank's last round, padding in the place of a row, a
# row twice, two neighbours exchanged, written by a rank that is not the owner, the last row lost, slots after the end of the
# batch, the wrong sequence number. And here are four checks as they are often written.

# %% survivors-predict
lesson.predict("survivors", ...)

# %% kills
table = lesson.kill_table(layout, round_=7)
alive = (table == "alive").sum()
assert not (table == "✓ killed").all().any(), "none of the four kills all ten"
table

# %% survivors-reveal
lesson.reveal("survivors", int(alive["lengths only"]))

# %% survivors-text [markdown]
# `one constant per rank` is what NCCL's own symmetric-memory example and several tests in PyTorch use: it does not see a
# stale round or two exchanged rows of one rank. Reading down a column: each check has a blind spot, and a bug lives there.

# %% e7-task [markdown]
# ### Exercise 7 · Write the check that kills all mutants
#
# **Goal** Write `accepts`. `got` is a list of `(round, rank, sequence, token)`, one per slot, as decoded from the rows
# (padding is all -1). `lengths` are the tokens of each sequence, `owners[i]` is the rank that owns the i-th token of the
# flattened batch, `round_` the round that was asked for. True for a right gather, false for every broken one.
#
# **Example** `lengths` [2], `owners` [0, 1], round 5: only `[(5, 0, 0, 0), (5, 1, 0, 1)]` is right.
#
# **About** 6 minutes, ★★☆


# %% e7
def accepts(got, lengths, owners, round_):
    """Whether a gather is right: every slot, and nothing else."""
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
# Do not look for faults. Say what is right, completely, and compare.
#
# ---
# Slot i must hold the i-th token of the flattened batch: its sequence, its place there, its owner, and this round.
#
# ---
# Build the list `wanted` of `(round_, owner, sequence, token)` in token order, and return `got == wanted`.
#
# ---
# **Why** A check that lists faults kills the faults on its list. A check that says what is right kills all of them, also
# those that nobody has thought of. The price is data that say who they are: a stamp in every row, and poison where nobody
# should write.
#
# **Another way** `torch.equal(rows, formula(round_, rank, token))` on the raw bytes, as `cpkit.provenance` does: it sees a wrong
# lane in the middle of a row too. Never compare with another collective: both may be wrong in the same way.

# %% s8 [markdown]
# ## 8. The bill
#
# Every rank knows the permutation *before* anything moves. So it can write each of its rows directly at its
# final place, in every peer's output. No padding, no strip, no reorder. That is `algorithm="direct"`.

# %% direct
direct = lab.gather(batch, cp_size=cp, algorithm="direct", round=7)
last = direct.stages[-1]
print("stages of direct:", " → ".join(direct.stages))
assert (direct.stage(last, 0) == reorder).all(), "the same bytes, from one pass"
figures.show(figures.stage_grid(direct))

# %% e8-task [markdown]
# ### Exercise 8 · The bill of a padded gather
#
# **Goal** Write `bill`: bytes that *one rank* writes in each stage of the padded gather. The rank holds `rows` rows, every
# rank's buffer has `max_rank_len`, the batch has `total` tokens. A rank that needs no padding does not copy.
#
# **Example** Rank 0 holds 2 rows, rank 1 holds 3; a row has 10 bytes. Rank 0 pads (30 bytes), receives 2 · 3 slots (60), and
# strips and reorders 5 rows (50 each): `bill(2, 3, 5, 2, 10)` is `{"pad": 30, "wire": 60, "strip": 50, "reorder": 50}`.
#
# **About** 4 minutes, ★★☆


# %% e8
def bill(rows, max_rank_len, total, cp_size, row_bytes):
    """Bytes written by one rank: {"pad": …, "wire": …, "strip": …, "reorder": …}."""
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
# Go through the four figures of section 4 and count the slots of each.
#
# ---
# The wire carries padding; strip and reorder write real rows only. The pad copies the *whole* shard into a longer buffer, not
# just the missing rows.
#
# ---
# `cp_size * max_rank_len` slots on the wire, `total` rows in strip and in reorder, `max_rank_len` or 0 in pad; times `row_bytes`.
#
# ---
# **Why** After the wire two more full passes are written, and each is read again. `direct` writes `total` rows once. Counting
# comes before tuning: a faster kernel for a pass that need not exist is no gain.
#
# **Another way** Count what is *read* too: every pass reads what it writes, so traffic is twice these bytes, except that the
# wire's reads happen in other ranks' memory.

# %% models-text [markdown]
# Now three real models, by the bytes of one token's K and V in one layer (bfloat16). One prompt of 32767 tokens, over your ranks.

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
# MLA gathers one latent of 576 elements instead of K and V: a smaller bill of the same shape. Notebook 3 puts times to these
# bytes. Writing into a peer's memory needs *symmetric memory*: that is notebook 2.

# %% s9 [markdown]
# ## 9. Try it
#
# Move the slider, or focus it and press the arrow keys. Each change runs a new gather on the workers, checks
# every byte, and redraws.

# %% stepper
from cpkit.notebook.stepper import Stepper

stepper = Stepper(lab, batch, cp_size=cp)
stepper

# %% stepper-check
stepper.wait(done=1)
stepper.cp_size.value = cp // 2  # as if you had moved the slider
stepper.wait(done=2)
assert len(stepper.figure.data[0].y) > 0

# %% s10 [markdown]
# ## How far did you come?

# %% progress
lesson.progress()

# %% end [markdown]
# ## What to remember
#
# - The layout is a permutation; everything else follows from it.
# - The padded length is the *maximum over ranks*. ceil(total / cp) is too small for some batches.
# - Pad, wire, strip, reorder: four passes over the data. One would do.
# - Wrong order has the right shape. Check places, not counts.
#
# ### Five questions
#
# Answer aloud, then open.
#
# <details><summary>1. Which ranks own the longest work under contiguous, and why not under zigzag?</summary>
#
# The last: late tokens look at more keys. Zigzag gives each rank one early and one late block.
# </details>
# <details><summary>2. When is ceil(total / cp) right?</summary>
#
# For one sequence. Several sequences may give their odd tokens to the same rank.
# </details>
# <details><summary>3. Why may padding stay uninitialised here, and where may it not?</summary>
#
# A gather copies and then drops it. Where padded rows enter a sum, an expert dispatch or a softmax, they must be masked.
# </details>
# <details><summary>4. What does x[a][b] cost, and what x[a[b]]?</summary>
#
# Two passes over the rows; one.
# </details>
# <details><summary>5. A test compares a new gather with NCCL's, on data torch.arange(n) + rank. What does it not see?</summary>
#
# A stale round (the same data every time), rows that two ranks have alike, and whatever both get wrong.
# </details>
#
# ### You can now read
#
# - SGLang `cp_utils.py` up to 0.5.18: `cp_all_gather_reorganized_into_tensor_kv_cache` is stages 1 to 3 (from 0.5.13 on with the
#   maximum over ranks), `cp_all_gather_rerange_kv_cache` is all four. In 0.5.23 its heirs are `layers/cp/zigzag.py` (`_all_gather_reorganized`) and
#   `layers/cp/interleave.py` (`_gather_interleaved_tensor`: strip and reorder in one `index_select`, as in exercise 5).
# - vLLM `reorg_kvcache` in `v1/attention/backends/mla/common.py`: exercises 4 and 5 in a loop over sequences and ranks.
# - TransformerEngine `AttnFuncWithCPAndKVAllGather`: gather K, gather V, then `index_select`.
#
# ### An open problem
#
# vllm#49517, #52863 and #57115 (all open) let every rank store its rows straight into each peer's *paged*
# cache. What is the permutation then, and who may say that a page is free?
#
# Next: `02_symmetric_memory.ipynb`.
