# %% title [markdown]
# # 3 · All-gather performance
#
# (The saved outputs contain the answers: choose *Edit → Clear Outputs of All Cells* before you begin.)
#
# Several algorithms gather the same bytes. Which one is the fastest, by how much, and why? A serving engine gathers in
# every layer, so a wrong answer costs time in each of them. In this notebook you compute what the hardware allows,
# measure what happens, and explain the difference. The loop is the same as before: predict, run, compare. Run a cell
# with `lesson.predict` to see its question, then put your answer in place of `...` and run it again.
#
# **Time** 75 minutes. **Needs** Linux on x86-64, and no GPU: the times are those of *this* machine. **Prerequisites**
# notebooks 1 and 2. A paragraph that begins with **On GPUs** says what differs there: with CPU ranks, skip it.
#
# After this notebook you can
# 1. convert a time into algbw and busbw, and compare it with the speed of light;
# 2. recognize nine mistakes that make a measured time wrong;
# 3. split a sweep into alpha and beta, and say which of them a change affects;
# 4. use the number of passes to predict the gain of removing one, and verify the prediction;
# 5. predict which kernel NCCL selects, and verify it in NCCL's own log.
#
# {glossary: algbw; busbw; speed of light; slowest rank; alpha, beta; pass; barrier; warm-up; first touch; skew; modelled}

# %% connect tags=["nbval-ignore-output"]
import cpkit
from cpkit_lessons import performance as lesson

lesson.explain_missing_names()  # the error for an undefined name then says what to run first
lab = cpkit.connect()
world = lesson.begin(lab)

# %% setup
from pathlib import Path
import numpy as np
import pandas as pd
from cpkit_lessons import figures

cp = world.cp_size  # world.of(n) returns n, or less where memory is short
pd.set_option("display.max_colwidth", None)
MB = 1_000_000
one = {"tensors": 1}  # one tensor of 8 heads · 128 · bfloat16: 2048 bytes per token

# %% s1 [markdown]
# ## 1. Units first
#
# A colleague reports "900 GB/s". Is that good? It depends on which bytes were counted. Let S be the size of the *whole*
# result, cp the number of ranks, and t the time of the slowest rank. **algbw** is S / t. But each rank already holds
# 1/cp of the result, so a link carries only (cp−1)/cp of S. **busbw** is algbw · (cp−1)/cp, and it is the number to
# compare with the rate of the hardware. One GB is 10⁹ bytes.
#
# These are the definitions of nccl-tests, except for t: nccl-tests reports the average over the ranks by default (`-a
# 1`), and the slowest rank with `-a 3`. Note that NCCL's own log lines count the bytes of *one rank*.

# %% busbw-predict
lesson.predict("busbw", ...)

# %% busbw
rank_bytes, time_us = 8.4 * MB, 20_000
size_bytes = cp * rank_bytes
algbw = size_bytes / time_us / 1000  # bytes per µs / 1000 = 10⁹ bytes per s
busbw = algbw * (cp - 1) / cp
print(f"S = {size_bytes / MB:.1f} MB, algbw = {algbw:.2f} GB/s")

# %% busbw-reveal
lesson.reveal("busbw", busbw)


# %% e1-task [markdown]
# ### Exercise 1 · algbw and busbw
#
# **Goal** Write `bandwidths`, which returns (algbw, busbw) in GB/s. Its first argument is the size that NCCL logs, the
# bytes of *one* rank.
#
# **Example** For 8 400 000 bytes per rank, 4 ranks and 20 000 µs, `bandwidths(8_400_000, 20_000.0, 4)` is `(1.68,
# 1.26)`.
#
# **About** 4 minutes, ★☆☆


# %% e1
def bandwidths(rank_bytes, time_us, cp_size):
    """Return (algbw, busbw) in GB/s of a gather in which every rank sends `rank_bytes`."""
    # >>> your code
    #: return 0.0, 0.0
    algbw_gbps = rank_bytes * cp_size / time_us / 1e3
    return algbw_gbps, algbw_gbps * (cp_size - 1) / cp_size
    # <<<


# %% e1-check
lesson.check_bandwidths(bandwidths)


# %% e1-mutant-one-rank
def bandwidths(rank_bytes, time_us, cp_size):
    algbw_gbps = rank_bytes / time_us / 1e3
    return algbw_gbps, algbw_gbps * (cp_size - 1) / cp_size


# %% e1-mutant-binary-units
def bandwidths(rank_bytes, time_us, cp_size):
    algbw_gbps = rank_bytes * cp_size / 2**30 / (time_us / 1e6)
    return algbw_gbps, algbw_gbps * (cp_size - 1) / cp_size


# %% e1-mutant-inverse-factor
def bandwidths(rank_bytes, time_us, cp_size):
    algbw_gbps = rank_bytes * cp_size / time_us / 1e3
    return algbw_gbps, algbw_gbps * cp_size / max(1, cp_size - 1)


# %% e1-help [markdown]
# What is S? It is not the size of one rank's shard.
#
# ---
# S = rank_bytes · cp_size. One byte per µs is 10⁶ bytes per second, which is a thousandth of a GB/s.
#
# ---
# Two lines are enough: `algbw = … / time_us / 1e3`, then return it together with `algbw * (cp_size - 1) / cp_size`.
#
# ---
# **Why** On a perfect machine, busbw does not depend on cp. So you can compare runs with different numbers of
# ranks.
#
# **Another way** Compute busbw directly from the bytes that a rank receives: `rank_bytes * (cp_size - 1) / time_us /
# 1e3`.

# %% s2 [markdown]
# ## 2. The speed of light
#
# Before you optimize, ask what is possible. Each rank must receive the (cp−1)/cp of S that it does not hold yet, and
# the ranks must synchronize. So the least time is alpha + S · (cp−1)/cp / B, where alpha is the cost of
# synchronization, and B the bandwidth of the link. We call this bound the *speed of light*.
#
# Which B belongs in this formula? Take what the link can do, not what an all-gather has reached: the all-gather is
# what you want to judge. One source is the data sheet: the NVLink of an H100 has 900 GB/s, half of it in each
# direction, so a GPU can receive 450 GB/s. Another is a plain copy between two GPUs. Between two H100s it reaches 383
# GB/s: half of 268 MB took 350 µs of *device time*, which is the time of the work on the GPU, without Python
# (`benchmarks/results/2026-11-28-gpu.json`, commit 6b142c512aef).
#
# Here is what goes wrong otherwise. NCCL's symmetric kernels on 8 × H100 take almost exactly 5.3 µs + received bytes /
# (328 GB/s): this line is within about 1 % of four published times (Megatron-LM#5596). If it were a bound, no gather of
# 268 MB on two GPUs could take less than 414 µs. But cpkit's `plan` (`direct`, prepared once) took 378 µs. The 328 GB/s
# are what NCCL *reaches*, and no limit of the link.


# %% e2-task [markdown]
# ### Exercise 2 · Speed of light of a link
#
# **Goal** Write `light_us`, which returns the least time in µs, given alpha in µs and the bandwidth of a rank's link in
# GB/s.
#
# **Example** For 268 MB on 2 ranks, no alpha and 383 GB/s, `light_us(268429312, 2, 0.0, 383)` is 350.4. (For
# comparison: in the record of the two H100s, NCCL's all-gather of these bytes took 556 µs with ordinary buffers, and
# 451 µs with the receive buffer registered.)
#
# **About** 3 minutes, ★☆☆


# %% e2
def light_us(total_bytes, cp_size, alpha_us, link_gbps):
    """Return the least time, in µs, of a gather whose result has `total_bytes`."""
    # >>> your code
    #: return 0.0
    received_bytes = total_bytes * (cp_size - 1) / cp_size
    return alpha_us + received_bytes / (link_gbps * 1e3)
    # <<<


# %% e2-check
lesson.check_light(light_us)


# %% e2-mutant-own-shard-too
def light_us(total_bytes, cp_size, alpha_us, link_gbps):
    return alpha_us + total_bytes / (link_gbps * 1e3)


# %% e2-mutant-bytes-a-second
def light_us(total_bytes, cp_size, alpha_us, link_gbps):
    return alpha_us + total_bytes * (cp_size - 1) / cp_size / (link_gbps * 1e9)


# %% e2-help [markdown]
# Which bytes must cross the link, and which are already there?
#
# ---
# A rank receives total · (cp−1)/cp bytes. And 1 GB/s is 10³ bytes per µs.
#
# ---
# `alpha_us + received_bytes / (link_gbps * 1e3)`.
#
# ---
# **Why** The line has two parameters. alpha dominates while S is small, and B while S is large.
#
# **Another way** Find the size at which both terms are equal: S = alpha · B · cp/(cp−1). For 5.3 µs, 328 GB/s and 8
# ranks it is 2 MB.

# %% light-text [markdown]
# ### And on this machine?
#
# On a CPU, and on a GPU that all ranks share, the memory sets the bound, not a link. A gather must at least synchronize
# once, *read* each of the S bytes once, and *write* each of them once for every rank. So (cp+1) · S bytes move. How
# long that takes is measured here, not looked up: every rank copies S bytes at the same time. Each copy reads S bytes
# and writes S bytes, so 2 · cp · S bytes move. So the bound is the time of these copies times (cp+1) / (2 · cp), plus
# one barrier. The fastest of all samples counts, because a bound is not an average.
#
# **On GPUs**, this bound and the sweep in section 5 are device times. The bound contains no barrier, because that
# barrier runs on the *host*, the CPU that runs Python. With one GPU per rank, the line below is the bound of each GPU's
# own memory. The bound of the link (`light_us` in exercise 2) is then a longer time.

# %% light tags=["nbval-ignore-output"] budget_s=60
from cpkit.notebook.views import floor_us

sizes = world.sizes()  # bytes: up to 67 MB, or less where memory is short
probes = {}
for n in sizes:
    print(f"copying {n / MB:.3g} MB on each rank …")
    probes[n] = lab.clock(["barrier", "copy"], n // 2048, cp, iterations=8, **one)
barrier_us = min(probe.slowest_us("barrier").min() for probe in probes.values())
# barrier (the fastest of all probes; none on a GPU) + (cp+1) / (2 · cp) · copy
light = {n: floor_us(probe, barrier_us) for n, probe in probes.items()}
assert light[sizes[-1]] > light[sizes[0]] > 0
figures.show(figures.roof(light))

# %% light-after [markdown]
# This line is drawn *before* any gather has run, and no gather changes it. If a measured time lies below it, either the
# measurement or the bound is wrong.
#
# The bound can be wrong for two reasons. On a busy machine the copies take longer; then run the cell again. And on a
# CPU, a gather whose rows are still in a cache can be faster than a copy that reads them from memory. So the next
# sections measure the algorithms in turn: then a large gather does not find its own rows in a cache.

# %% s3 [markdown]
# ## 3. One gather on a clock
#
# Where does the time of a gather go, and which rank waits for which? From here on you compare three algorithms:
#
# | algorithm | what each rank does |
# |---|---|
# | `padded` | pads, calls the collective of torch.distributed, strips, reorders |
# | `padded_symm` | copies into symmetric memory, pushes to all peers, strips, reorders |
# | `direct` | pushes every row to its final position in all peers |
#
# All ranks read the same clock, so you can compare their stages in one figure: `agree` (all ranks check that they make
# the same call), `allocate` (outputs in the pool), `wire` (rows move), `exit` (a barrier: all rows have arrived), and
# the passes `pad`, `strip` and `reorder`. First trace the classic pipeline.

# %% trace-padded tags=["nbval-ignore-output"]
traced = world.of(4096)  # tokens
padded = lab.trace(traced, cp, algorithm="padded", **one)
assert set(padded.table["rank"]) == set(range(cp))
figures.show(figures.timeline(padded.table, "padded"))

# %% trace-direct-text [markdown]
# Now `direct`: every rank writes each row once, at its final position. Note that the time axis has a different scale.

# %% trace-direct tags=["nbval-ignore-output"]
direct = lab.trace(traced, cp, algorithm="direct", **one)
assert not {"pad", "strip", "reorder"} & set(direct.table["stage"]), (
    "direct does not need these passes"
)
figures.show(figures.timeline(direct.table, "direct"))
reports = Path("reports")
reports.mkdir(exist_ok=True)
direct.save_chrome_trace(reports / "direct_trace.json")

# %% trace-after [markdown]
# In the stages `agree` and `exit`, ranks wait for each other. `padded` has no `exit`: its ranks wait inside the
# collective, in `wire`. A white gap after a stage is Python code, or a rank that waits for a core.
# `reports/direct_trace.json` contains the same data for https://ui.perfetto.dev. But this is a *single* gather. Is it
# typical?
#
# **On GPUs**, `direct` waits inside its kernel, in `wire`. With one GPU per rank, NCCL does the push of `padded_symm`.
# Where ranks share a GPU, `padded` pulls the rows from its peers and has an `exit`, because NCCL does not support two
# ranks on one GPU.

# %% s4 [markdown]
# ## 4. How to measure a wrong time
#
# Why do two engineers measure different times for the same gather? Usually one of them forgot something. `lab.clock`
# returns every sample of every rank, and it can leave out what a fair measurement needs. The first mistake is to leave
# out the barrier before the clock starts. In a model, ranks arrive at the gather whenever their own work is done. Here
# rank r arrives r · 5 ms late, on purpose. This difference between the ranks is called *skew*.

# %% late-predict
lesson.predict("late", ...)

# %% late tags=["nbval-ignore-output"]
small = 512
late = {"late_us": 5000, "iterations": 16, **one}
fair = lab.clock(["direct"], small, cp, **late)
unfair = lab.clock(["direct"], small, cp, barrier=False, **late)
print(
    "median of each rank, barrier first (µs):", np.median(fair.times_us("direct"), axis=0).round()
)
print(
    "median of each rank, no barrier (µs):   ", np.median(unfair.times_us("direct"), axis=0).round()
)
assert unfair.median_us("direct") > (cp - 1) * 5000 * 0.84, "rank 0 waits while its clock runs"

# %% late-reveal
lesson.reveal("late", unfair.median_us("direct") / 1000)

# %% wrong-text [markdown]
# ### Eight mistakes, and a ninth on GPUs
#
# The figure below shows eight mistakes, the missing barrier among them: each wrong time is beside the right one. Some
# of the names need an explanation. *No wait*: the clock stops before the call has ended. *Fastest rank*: the time of
# the rank that was fastest. *Rates averaged*: the mean of the rates, instead of the rate at the mean of the times.
# *First touch*: a copy into memory that was never written.

# %% damage-predict
lesson.predict("damage", ...)

# %% mistakes-1 tags=["nbval-ignore-output"] budget_s=60
from cpkit_lessons.mistakes import Mistake, noisy_neighbour

tokens = world.of(4096)
lab.pool.configure(world.of(1 << 20), cp)  # a small arena, so the first gather makes a new segment
cold = lab.clock(["direct"], tokens, cp, iterations=4, warmup=0, **one)
lab.pool.configure(cp_size=cp)  # the default arena again
calls = ["direct", "launch", "collective", "copy", "copy_fresh"]
warm = lab.clock(calls, tokens, cp, iterations=12, on_progress=print, **one)
times = warm.times_us("direct")  # [iterations, ranks]
slowest = times.max(axis=1)
right = np.median(slowest)
print(warm)

# %% mistakes-1-text [markdown]
# `cold` started without warm-up, in a pool without free space. `copy_fresh` copies into memory that was never written
# before: the operating system first has to find and clear each page. `p95_us` is the time that 95 % of the samples do
# not exceed. `launch` only starts the collective, and its clock stops before the collective has ended.
#
# **On GPUs**, `launch` starts `direct` instead of the collective. `copy_fresh` can be as fast as `copy`, because torch
# may reuse memory.
#
# The next cell measures `direct` against *itself*, so the true ratio is 1. It makes two runs, the first while other
# threads disturb the machine, the second without them. In each run, two copies of `direct`, A and B, alternate (A B A B
# …). The samples are then compared in two ways. The mistake (*one after the other* in the figure) compares the A
# samples of the first run with those of the second. The right way compares each A with the B that follows it.

# %% mistakes-2 tags=["nbval-ignore-output"]
with noisy_neighbour():  # other threads use the machine during this run, not during the next
    disturbed = lab.clock(["direct", "direct"], tokens, cp, iterations=10, **one)
quiet = lab.clock(["direct", "direct"], tokens, cp, iterations=10, **one)
after_another = disturbed.median_us("direct"), quiet.median_us("direct")
print(f"A of the first run / A of the second: {after_another[0] / after_another[1]:.2f}")

# %% mistakes-2-spread tags=["nbval-ignore-output"]
pairs = np.concatenate(
    [run.slowest_us("direct") / run.slowest_us("direct#2") for run in (disturbed, quiet)]
)
low, high = np.percentile(pairs, [25, 75])
spread = f"middle half of the {len(pairs)} pairs: {low:.3f} to {high:.3f}"
print(f"each A / the B that follows it: {np.median(pairs):.2f}; {spread}")
print("the pairs show", "no difference" if low <= 1 <= high else "a difference that does not exist")

# %% mistakes-2-text [markdown]
# Even when the samples alternate, the ratio is seldom exactly 1. Look at the spread: if the middle half of the pairs
# contains 1, no difference was shown, however far from 1 the ratio itself is. If it does not contain 1 here, where both
# are the same code, the noise was too strong. Then use a quieter machine, and draw no conclusion until the spread
# contains 1.
#
# With two *different* variants, such a result would not show whether its cause is noise or a real difference. So
# measure one variant against itself first, and trust only differences that are larger than that spread. The middle half
# is a quick look at the noise. From here on, a difference counts if 1 is outside the *99 % interval* of the ratio. This
# interval contains the true median ratio with a probability of 99 %.

# %% mistakes-flatter tags=["nbval-ignore-output"]
samples = {name: warm.slowest_us(name) for name in warm.calls}
started = "direct" if world.on_gpu else "collective"  # the call that `launch` starts
typical = {name: np.median(values) for name, values in samples.items()}
found = {
    "no wait": Mistake(typical[started], typical["launch"], samples[started]),
    "fastest rank": Mistake(right, np.median(times.min(axis=1)), slowest),
    "rates averaged": Mistake(slowest.mean(), 1 / (1 / slowest).mean(), slowest),
}
assert found["rates averaged"].factor <= 1, "a mean of rates always flatters"
print({name: f"{mistake.factor:.2f} ×" for name, mistake in found.items()})

# %% mistakes tags=["nbval-ignore-output"]
fair_us, quiet_us = fair.slowest_us("direct"), quiet.slowest_us("direct")
found |= {
    "mean, not median": Mistake(right, slowest.mean(), slowest),
    "one after the other": Mistake(after_another[1], after_another[0], quiet_us),
    "no warm-up": Mistake(right, cold.slowest_us("direct")[0], slowest),
    "first touch": Mistake(typical["copy"], typical["copy_fresh"], samples["copy"]),
    "no barrier": Mistake(np.median(fair_us), unfair.median_us("direct"), fair_us),
}
figures.show(figures.damage(found))

# %% damage-text [markdown]
# You predicted an order. Are the measured differences larger than the noise? The next cell computes each ratio,
# reported time / right time, with its 99 % interval. For *no wait*, the right time is the time from the call of
# `launch` until the work that it starts is complete. The first two ratios come from pairs of samples, so they can
# differ from the figure: on a busy machine by much. The third compares two runs, so it is the ratio of their medians.
# The reveal then writes the order: `<` where two intervals do not overlap, `≈` where they do. A prediction is right if
# it does not reverse a clear difference.

# %% damage-order tags=["nbval-ignore-output"]
from cpkit.timing import Ratio

factors = {
    "no wait": Ratio.of_pairs(samples["launch"], samples[started]),
    "fastest rank": Ratio.of_pairs(times.min(axis=1), slowest),
    "no barrier": Ratio.of_separate(unfair.slowest_us("direct"), fair_us),
}
for name, factor in factors.items():
    print(f"{name}: {factor}")

# %% damage-reveal
lesson.reveal("damage", lesson.order_of(factors))

# %% mistakes-text [markdown]
# In the figure of the mistakes, a mark left of the line means that the gather seems faster than it is, and a mark right
# of the line that it seems slower. "No wait" can even be *below the speed of light*. Then the bound reveals the mistake
# even if you do not know the code. "Rates averaged" also happens in well-known tools: `all_reduce_bench.py` in the
# repository stas00/ml-engineering averages rates.
#
# A ninth mistake occurs only on a GPU, where its effect is large: timing *eager* calls, which are launched one by one
# from Python. On two H100s, SGLang's pipeline took 242 µs per call from Python at 0.26 MB, but only 13.9 µs of GPU time
# in a CUDA graph (`benchmarks/results/2026-11-28-gpu.json`, commit 6b142c512aef). A serving engine that captures its
# model in a CUDA graph pays only the 13.9 µs. Section 9 returns to these two clocks.
#
# {glossary: eager; CUDA graph}


# %% e3-task [markdown]
# ### Exercise 3 · The time of a gather
#
# **Goal** Write `gather_us`, which returns the typical time of a gather, given `times_us`, an array `[iterations,
# ranks]`. The first `warmup` iterations do not count. A gather ends when its slowest rank ends. One extreme iteration
# must not change the result much, so "typical" means a median.
#
# **Example** Let `times_us` be `[[90, 80], [10, 12], [30, 11], [9, 13]]`, with `warmup=1`. The gathers took 12, 30 and
# 13 µs, so the answer is 13.
#
# **About** 4 minutes, ★★☆


# %% e3
def gather_us(times_us, warmup):
    """Return the typical time of one gather, in µs."""
    # >>> your code
    #: return times_us.mean()
    slowest = times_us[warmup:].max(axis=1)
    return np.median(slowest)
    # <<<


# %% e3-check
lesson.check_gather_us(gather_us)


# %% e3-mutant-mean
def gather_us(times_us, warmup):
    return times_us[warmup:].max(axis=1).mean()


# %% e3-mutant-rank-0
def gather_us(times_us, warmup):
    return np.median(times_us[warmup:, 0])


# %% e3-mutant-cold
def gather_us(times_us, warmup):
    return np.median(times_us.max(axis=1))


# %% e3-mutant-largest-median
def gather_us(times_us, warmup):
    return np.median(times_us[warmup:], axis=0).max()


# %% e3-mutant-best
def gather_us(times_us, warmup):
    return times_us[warmup:].max(axis=1).min()


# %% e3-help [markdown]
# There are two axes. Which statistic do you need over the ranks, and which over the iterations?
#
# ---
# First take the maximum over the ranks. Then take the median over the iterations.
#
# ---
# `times_us[warmup:]`, then `.max(axis=1)`, then `np.median`.
#
# ---
# **Why** In the other order the result is a different number. The slowest rank changes from one gather to the next, and
# the largest of the ranks' medians does not show that. `lab.sweep` reports that number as `time_us`, because it keeps
# one median per rank, and not the samples. It is never larger than yours. The live panel of section 10 uses your order.
#
# **Another way** `fair.begin_us("direct")` returns the time at which each rank started. Add `times_us` to get each end,
# and take the last end minus the first start. This also includes the skew that the barrier itself leaves.

# %% s5 [markdown]
# ## 5. A sweep
#
# A production batch can be small or large. Does the same algorithm win at every size? A *sweep* times the same gathers
# at several sizes, here at five. At each size, the three algorithms alternate, so that noise affects all three alike.

# %% ranking-predict
lesson.predict("ranking", ...)

# %% sweep tags=["nbval-ignore-output"] budget_s=90
algorithms = ["padded", "padded_symm", "direct"]
print(f"timing {len(algorithms)} algorithms at {len(sizes)} sizes …")
what = {"sizes_bytes": sizes, "cp_sizes": [cp], "algorithms": algorithms, **one}
table = lab.sweep(**what, iterations=5, on_progress=print)
assert len(table) == len(sizes) * len(algorithms)
names = "size_bytes count type algorithm time_us algbw_gbps busbw_gbps path"
table[names.split()].round(3)

# %% sweep-check
row = table.iloc[0]
expected = row["size_bytes"] / row["time_us"] / 1e3 * (cp - 1) / cp
assert abs(row["busbw_gbps"] - expected) < 1e-6 * expected, "the table uses the units of section 1"

# %% ranking-text [markdown]
# Five gathers per row are too few to tell a small difference from noise. So the next cell times more gathers at a
# quarter of the largest size, and in each iteration it divides the times of two algorithms. `<` means that the first of
# the two is faster: the 99 % interval of the median ratio is below 1. `≈` means that it contains 1.
#
# (Why is `time_us` in the table above not computed as in exercise 3? The sweep keeps one median per rank, and not the
# times of single gathers. So it reports the largest of these medians, which can be smaller than the result of exercise
# 3, never larger.)

# %% ranking tags=["nbval-ignore-output"] budget_s=60
medium = sizes[-1] // 4 // 2048  # tokens
print(f"timing each algorithm 15 times at {medium * 2048 / MB:.3g} MB …")
run = lab.clock(algorithms, medium, cp, iterations=15, on_progress=print, **one)
order_seen = lesson.order(run, algorithms)
print(order_seen)

# %% ranking-reveal
lesson.reveal("ranking", order_seen)

# %% sweep-figure tags=["nbval-ignore-output"]
figures.show(figures.roof(light, table))
largest = table[table["size_bytes"] == sizes[-1]].set_index("algorithm")["time_us"]
factor = largest["padded"] / largest["direct"]
print(f"at {sizes[-1] / MB:.3g} MB padded takes {factor:.1f} times as long as direct")
below = table["time_us"] < table["size_bytes"].map(light)
print(f"below the speed of light: {below.sum()} of {len(table)} times")

# %% sweep-text [markdown]
# At the left end, the times grow much more slowly than the bytes, or not at all: most of the time is a *fixed cost*. On
# the CPU this is Python code and waiting, and it grows when there are more ranks than cores. At the right end, most of
# the time is spent on *bytes*.
#
# `padded` and `padded_symm` can cost more than 8 times as much at 67 MB as at 8 MB, for two likely reasons. The rows
# may no longer fit into the cache; then the bound rises by more than 8 times too. And their results are in ordinary
# memory: from 33.6 MB (32 MiB) on, the C library requests new pages from the operating system for every call, and every
# call pays for the first touch. `direct` writes into the pool, whose pages stay mapped.
#
# **On GPUs**, the fixed cost is the start of kernels and their signals. With one GPU per rank, `direct` stays above the
# line, which is the bound of a GPU's own memory.
#
# Is a time *below* the speed of light? Then the bound is probably wrong: in section 2, other programs may have slowed
# its copies down, or here the rows were in a cache. Run the cell in section 2 again, and then the cell that draws the
# figure above.

# %% s6 [markdown]
# ## 6. Alpha and beta
#
# How can you summarize a whole table of times? Fit a line: t = alpha + beta · S. The two numbers also tell you which
# change can help: fewer synchronizations reduce alpha, and fewer bytes or passes reduce beta. Here the line is fitted
# to `direct`. The largest size is up to 4096 times the smallest, so the fit must minimize the *relative* error, not the
# absolute one.

# %% alpha-predict
lesson.predict("alpha", ...)

# %% fit tags=["nbval-ignore-output"]
mine = table[table["algorithm"] == "direct"]
alpha_us, us_per_byte = lesson.fit_line(mine["size_bytes"], mine["time_us"])
if us_per_byte <= 0:  # on a GPU, a kernel's fixed time can hide that of moving these bytes
    print("the times do not grow with the size, so beta is that of the bound")
    us_per_byte = (light[sizes[-1]] - light[sizes[0]]) / (sizes[-1] - sizes[0])
print(f"direct: alpha {alpha_us:.0f} µs, 1/beta {1e-3 / us_per_byte:.2f} GB/s")
errors = (alpha_us + us_per_byte * mine["size_bytes"]) / mine["time_us"] - 1
print("off by", ", ".join(f"{error:+.0%}" for error in errors), "from the smallest to the largest")
figures.show(figures.roof(light, mine, ("direct", alpha_us, us_per_byte)))

# %% alpha-reveal
lesson.reveal("alpha", alpha_us / (alpha_us + us_per_byte * sizes[0]))


# %% e4-task [markdown]
# ### Exercise 4 · Fit alpha and beta
#
# **Goal** Write `fit`, which returns (alpha in µs, beta in µs per byte) for given sizes and times. Each sample is off
# by up to 5 %, and one of them, at the smallest or the largest size, is 25 % too slow. The check compares your line
# with the true one at other sizes, including small ones. It allows an error of 25 %, so you need not detect the slow
# sample.
#
# **Example** The times are exactly 10 µs + bytes / 1000. Then `fit([16384, 1048576], [26.384, 1058.576])` is `(10.0,
# 0.001)`.
#
# **About** 7 minutes, ★★☆


# %% e4
def fit(sizes_bytes, times_us):
    """Return (alpha_us, us_per_byte) of the line with the least relative error."""
    # >>> your code
    #: us_per_byte, alpha_us = np.polyfit(sizes_bytes, times_us, 1)
    #: return alpha_us, us_per_byte
    weights = 1 / np.asarray(times_us)  # an error of 1 % counts the same at every size
    us_per_byte, alpha_us = np.polyfit(sizes_bytes, times_us, 1, w=weights)
    return alpha_us, us_per_byte
    # <<<


# %% e4-check
lesson.check_fit(fit)


# %% e4-mutant-through-zero
def fit(sizes_bytes, times_us):
    return 0.0, np.mean(np.asarray(times_us) / np.asarray(sizes_bytes))


# %% e4-mutant-largest-two
def fit(sizes_bytes, times_us):
    us_per_byte, alpha_us = np.polyfit(sizes_bytes[-2:], times_us[-2:], 1)
    return alpha_us, us_per_byte


# %% e4-mutant-two-ends
def fit(sizes_bytes, times_us):
    us_per_byte = (times_us[-1] - times_us[0]) / (sizes_bytes[-1] - sizes_bytes[0])
    return times_us[0] - us_per_byte * sizes_bytes[0], us_per_byte


# %% e4-help [markdown]
# Run the check on the starter. At which size is it wrong, and how large is the time there?
#
# ---
# At 64 MiB, an error of 5 % can be larger than all of alpha. Give every point the weight 1 / time.
#
# ---
# `np.polyfit` has an argument `w`. It multiplies the residuals, not their squares.
#
# ---
# **Why** Least squares minimizes errors in µs, but you care about errors in per cent. With w = 1/t, each residual
# is a relative error.
#
# **Another way** Minimize the error of log(time), for example with `scipy.optimize`. A factor then counts the same in
# both directions. (A line through the first and the last sample is quick to compute, but one slow sample at an end
# makes it wrong, and the check rejects it.)

# %% e4-after [markdown]
# Look at the errors of the fitted sweep, which the cell with the fit printed. Each point comes from only five gathers,
# so on a busy machine the line can be off by half, or more, at some size. In that case alpha and beta are only
# estimates. Two numbers are a first model. `cpkit.cost` contains a more complete one: it counts the bytes of each
# algorithm, distinguishes cache, memory and first touch, and distributes the ranks over the cores. `make bench` checks
# it at sizes and values of cp to which it was not fitted.

# %% s7 [markdown]
# ## 7. Count passes, then remove them
#
# Can you price a gather before you run it? A *pass* reads and writes all gathered rows once. Every step that moves rows
# is one pass, or a part of one. So first count the passes, and then ask what a pass costs. Begin with `padded_symm`,
# whose steps are in the table of section 3.

# %% passes-predict
lesson.predict("passes", ...)

# %% passes
batch = [4 * cp, 2 * cp]  # zigzag spreads them evenly, so there is no padding
rows = {name: lesson.rows_written(lab.gather(batch, cp, algorithm=name)) for name in algorithms}
passes = pd.DataFrame(rows).T.fillna(0).astype(int)
passes["passes"] = passes.sum(axis=1) / sum(batch)
passes

# %% passes-reveal
lesson.reveal("passes", passes.loc["padded_symm", "passes"])

# %% passes-text [markdown]
# For each stage, the table counts the rows that are written into the buffers of rank 0. In a push, all ranks write
# these rows. The shards are equally long here, so each rank writes as many rows into the buffers of all ranks as it
# receives in its own. `padded` copies nothing in `pad`, because there is no padding. `padded_symm` always copies its
# shard into symmetric memory.
#
# What does a pass cost? You can measure that on its own: it is the time of `copy`. The wire of `padded` has a price of
# its own, that of the collective. In a gather of N rows, a stage that writes n rows costs n / N of such a price. With
# padding, the wire carries more rows than there are tokens, so n can be larger than N. The price of a gather is the sum
# over its stages, plus two barriers.


# %% e5-task [markdown]
# ### Exercise 5 · The price of a gather
#
# **Goal** Write `price_us`. `rows` contains the number of rows that a rank wrote in each stage. Writing `total` rows
# costs `wire_us` in the stage `wire`, and `copy_us` in any other stage. Count two barriers, at `barrier_us` each.
# (Count two for `padded` as well, although its second wait is inside the collective.)
#
# **Example** `price_us({"pad": 3, "wire": 12}, 10, 5.0, 20.0, 1.0)` is 2 · 1 + 3/10 · 5 + 12/10 · 20 = 27.5.
#
# **About** 5 minutes, ★★☆


# %% e5
def price_us(rows, total, copy_us, wire_us, barrier_us):
    """Return the price of a gather of `total` rows, in µs."""
    # >>> your code
    #: return 2 * barrier_us + wire_us
    passes_us = 0.0
    for stage, written in rows.items():
        passes_us += written / total * (wire_us if stage == "wire" else copy_us)
    return 2 * barrier_us + passes_us
    # <<<


# %% e5-check
lesson.check_price(lab, price_us)


# %% e5-mutant-padding-is-free
def price_us(rows, total, copy_us, wire_us, barrier_us):
    copies = sum(stage != "wire" and written / total for stage, written in rows.items())
    return 2 * barrier_us + wire_us + copies * copy_us


# %% e5-mutant-whole-passes
def price_us(rows, total, copy_us, wire_us, barrier_us):
    return 2 * barrier_us + wire_us + (len(rows) - 1) * copy_us


# %% e5-mutant-no-meeting
def price_us(rows, total, copy_us, wire_us, barrier_us):
    return sum(n / total * (wire_us if stage == "wire" else copy_us) for stage, n in rows.items())


# %% e5-help [markdown]
# The table above has one row per algorithm. Which of its numbers differ from the number of tokens? And which others
# differ if the lengths need padding?
#
# ---
# The price of a stage is (rows that it wrote / total) · price of a pass. The wire also carries padding, so it writes
# more than `total` rows.
#
# ---
# `2 * barrier_us + sum(…)` over `rows.items()`.
#
# ---
# **Why** In one shared memory, all stages except the collective move bytes at about the same rate, so their number
# decides the time: count passes before you tune. Over links there are two rates: 383 GB/s from one H100 to another
# (section 2), and up to 3.35 TB/s within its own memory (data sheet).
#
# **Another way** Use two prices per stage, one for reading and one for writing. You need this where a stage reads more
# than it writes.

# %% price-text [markdown]
# Is a price by count worth anything? The next cell predicts the times of the three algorithms at a quarter of the
# largest size, and measures them.

# %% priced tags=["nbval-ignore-output"] budget_s=60
calls = ["barrier", "copy", "collective", *algorithms]
print(f"timing {len(calls)} calls at {medium * 2048 / MB:.3g} MB …")
run = lab.clock(calls, medium, cp, iterations=9, on_progress=print, **one)
costs = {name: run.median_us(name) for name in calls}
predicted = {
    name: lesson.price(rows[name], sum(batch), costs["copy"], costs[wire], costs["barrier"])
    for name, wire in zip(algorithms, ("collective", "copy", "copy"))
}
measured = {name: costs[name] for name in algorithms}
print(f"padded_symm / direct: {lesson.call_ratio(run, 'padded_symm', 'direct')}")
figures.show(figures.steps(predicted, measured))

# %% priced-text [markdown]
# On CPU ranks, the time falls in two steps, each with its own cause. From `padded` to `padded_symm`, a push into the
# memory of the peers replaces the collective. From `padded_symm` to `direct`, two copies of the result (strip and
# reorder) disappear. So does the small copy into the symmetric shard. Only the push remains.
#
# **On GPUs**, these are *call times*: they include the Python code that starts the kernels. With one GPU per rank,
# `padded` and `padded_symm` both call NCCL, and `padded_symm` can have the longer call time. On a shared GPU, both move
# about as many bytes, so the first step is small.
#
# By count, `padded_symm` takes 3 + 1/cp times as long as `direct`. The measured ratio is near this only while the
# memory's bandwidth is the limit. It is smaller where both times contain much else: barriers in a small gather, the
# host's work on a GPU. It is larger where strip and reorder cost more than the push, for example because they pay for
# new pages of memory.
#
# Does the same hold on GPUs with NVLink? The next cell prints a record of two H100s. It contains device times, from
# CUDA graphs.
#

# %% passes-recorded
from cpkit_lessons import recordings

record = next(each for each in recordings.read() if each.name == "2026-11-28-gpu.json")
on_gpus = record.table.pivot_table(index="size_bytes", columns="variant", values="time_us")
on_gpus = on_gpus[["NCCL", "seed", "plan"]]
on_gpus["pad, strip, reorder"] = on_gpus["seed"] - on_gpus["NCCL"]
on_gpus["passes / NCCL (%)"] = 100 * on_gpus["pad, strip, reorder"] / on_gpus["NCCL"]
environment = record.environment
print(f"{record.name}, commit {environment['commit']}, {environment['date']}: {record.machine}")
print(f"NCCL {environment['nccl']}; times in µs, size of the result in bytes")
on_gpus.round(1)

# %% passes-recorded-text [markdown]
# `NCCL` is the collective alone. `seed` is SGLang's pipeline: the same collective, with pad, strip and reorder around
# it. At 67 MB these passes take four fifths of the time of the collective, and at 268 MB nine tenths. `plan` is
# `direct`, prepared once. It needs none of these passes, and it is faster than the collective alone.

# %% look-back [markdown]
# ### Look back
#
# Predicted and measured times differ. What does the prediction leave out? `lab.measure` splits each gather into its
# stages.


# %% stages tags=["nbval-ignore-output"]
split = list(lab.measure(medium, cp, algorithms=algorithms, samples=1, **one))
assert [each.workload.algorithm for each in split] == algorithms
assert not {"pad", "strip", "reorder"} & set(split[-1].stage_us), "direct has none of them"
figures.show(figures.stage_split(split))

# %% look-back-after [markdown]
# On the CPU, `agree` and `exit` are synchronization: they include the time of Python code, and the time that ranks wait
# for a core. `strip` and `reorder` may also pay for new memory, and `allocate` takes the outputs from the pool. Of all
# this, the prediction contains only two bare barriers. It is good enough for a decision as long as it ranks the gains
# correctly, which it may not do where ranks wait for cores. Each bar is a single sample: run the cell again before you
# trust one of its stages.
#
# The stages of `direct` can add up to more than its measured time in the figure *Passes removed: predicted and
# measured*. There, each call of `direct` repeats an earlier one, and a repeated call skips a part of `agree` and
# `allocate`. A call whose stages are recorded skips nothing. (On the CPU, only gathers of up to 16.8 MB / cp skip
# anything.)


# %% e6-task [markdown]
# ### Exercise 6 · Few copies, final positions
#
# **Goal** `direct` needs a list of copies: which rows of the shard go to which tokens. `tokens[i]` is the token in row
# i. Write `copies`, which returns a list of (first row, first token, length), as short as possible. One copy moves
# consecutive rows to consecutive tokens.
#
# **Example** A rank holds the tokens `[0, 1, 6, 7]`. Then `copies([0, 1, 6, 7])` is `[(0, 0, 2), (2, 6, 2)]`.
#
# **About** 8 minutes, ★★★


# %% e6
def copies(tokens):
    """Return (row, token, length) of each copy; together they move every row to its token."""
    # >>> your code
    #: return [(0, tokens[0], len(tokens))] if tokens else []
    plan = []
    for row, token in enumerate(tokens):
        if plan and token == tokens[row - 1] + 1:
            first_row, first_token, length = plan[-1]
            plan[-1] = (first_row, first_token, length + 1)
        else:
            plan.append((row, token, 1))
    return plan
    # <<<


# %% e6-check
lesson.check_copies(copies)


# %% e6-mutant-row-by-row
def copies(tokens):
    return [(row, token, 1) for row, token in enumerate(tokens)]


# %% e6-mutant-ascending
def copies(tokens):
    plan = []
    for row, token in enumerate(tokens):
        if plan and token > tokens[row - 1]:
            plan[-1] = (*plan[-1][:2], plan[-1][2] + 1)
        else:
            plan.append((row, token, 1))
    return plan


# %% e6-mutant-loses-the-last
def copies(tokens):
    plan, first = [], 0
    for row in range(1, len(tokens)):
        if tokens[row] != tokens[row - 1] + 1:
            plan.append((first, tokens[first], row - first))
            first = row
    return plan


# %% e6-help [markdown]
# When do two neighbouring rows go to neighbouring positions?
#
# ---
# They do when the second token is the first token plus one. Then the current copy grows by one row. Otherwise a new
# copy begins.
#
# ---
# Keep a list. Compare with `tokens[row - 1]`. Either make the last entry one row longer, or append `(row, token, 1)`.
#
# ---
# **Why** Each copy has an alpha of its own: a call, a kernel, a descriptor. Zigzag needs at most two copies per
# sequence, however long it is. Interleave needs one copy per token, unless a copy can have a stride.
#
# **Another way** `np.flatnonzero(np.diff(tokens) != 1) + 1` are the positions of the cuts, and `np.split` does the
# rest.

# %% s8 [markdown]
# ## 8. The price of padding
#
# Is padding worth optimizing? For one long sequence, padding costs almost nothing. For many short sequences it costs
# much more. Compare two batches with the same number of tokens. The first has 64 sequences of 2·cp + 1 tokens. The
# second has more sequences, each of exactly 2·cp tokens (on 4 ranks: 64 sequences of 9, and 72 of 8).

# %% padding-predict
lesson.predict("padding", ...)

# %% padding tags=["nbval-ignore-output"]
odd, even = [2 * cp + 1] * 64, [2 * cp] * (64 + 32 // cp)
row = {"heads": max(1, world.of(32)), "tensors": 1}
carried, times_us = [], []
for lengths in (odd, even):
    gathered = lab.gather(lengths, cp, algorithm="padded_symm", **row)
    carried.append(len(gathered.stage("wire", 0)))
    timed = lab.clock(["padded_symm", "direct"], lengths, cp, iterations=10, **row)
    times_us.append({call: timed.slowest_us(call) for call in timed.calls})
    name = f"{len(lengths)} × {lengths[0]}"
    print(f"{name}: {sum(lengths)} tokens, {carried[-1]} slots on the wire")
for call in timed.calls:
    first_us, second_us = (each[call] for each in times_us)
    medians = f"{np.median(first_us):,.0f} and {np.median(second_us):,.0f} µs"
    print(f"{call}: {medians}, {Ratio.of_separate(first_us, second_us)}")

# %% padding-reveal
lesson.reveal("padding", carried[0] / sum(odd))

# %% padding-text [markdown]
# The slots are exact: the first batch has clearly more of them. But only the wire carries padding, and it is one of
# about three passes of `padded_symm`. So by count, if its wire carries 30 % more, the first batch should take about 10
# % longer. Does your measurement show that? The two batches run one after the other, so load on the machine does not
# cancel (section 4). If the 99 % interval of their ratio contains 1, the noise of this machine is larger than the price
# of this padding.
#
# Look at `direct` too. It sends no padding. But on the CPU it makes up to two copies per sequence and peer, each with
# an alpha of its own. For many short sequences, these copies can cost more than the padding. Count both.
#
# **On GPUs**, these are call times, and one kernel makes all copies of `direct`.

# %% s9 [markdown]
# ## 9. What symmetric memory gains at each size
#
# Should you register buffers for large gathers too? The times below are from Megatron-LM#5596, for 8 × H100. They were
# not measured on your machine. They compare NCCL's ordinary kernels (its *ring*) with its symmetric kernels on the same
# all-gather. Each time is the minimum over the ranks of the kernel's time, so it excludes waiting for a late rank. This
# notebook reports the slowest rank, which takes at least as long. At 2 MiB, symmetric memory is 1.86 times as fast.
# SGLang#17756 reports 27.584 → 13.696 µs for the CP gather of a prompt of 16K tokens.
#
# {glossary: ring; symmetric kernel; multicast}

# %% stops-predict
lesson.predict("stops", ...)

# %% stops
from cpkit_lessons.published import SYMMETRIC

published = zip(SYMMETRIC.sizes_bytes, SYMMETRIC.ring_us, SYMMETRIC.symmetric_us)
for size, ring_us, symmetric_us in published:
    saved = f"{ring_us} - {symmetric_us} = {ring_us - symmetric_us:.1f} µs saved"
    print(f"{size >> 20:3} MiB ({size / MB:5.1f} MB): {saved}")
figure = figures.gain(SYMMETRIC.sizes_bytes, SYMMETRIC.speedups)
figures.show(
    figures.recorded(figure, machine=SYMMETRIC.machine, date="2026-07-01", source=SYMMETRIC.source)
)

# %% stops-reveal
lesson.reveal("stops", SYMMETRIC.speedups[-1])

# %% stops-text [markdown]
# The saved time first grows with the size, and then stays about the same. A lower fixed cost would save the same time
# at every size, and a higher rate would save more and more time. The data show neither. NCCL changes the protocol of
# its ring with the size, so no single line fits the ring's time. One line nearly fits that of the symmetric kernels
# (section 2). The speedup falls from each of these sizes to the next. Megatron-LM#5655 has smaller sizes too. There the
# speedup first rises and then falls: it is 1.3 to 2.1 × between 1 and 16 MiB, highest near 4 MiB, and there is no gain
# at 256 MiB.
#
# Two H100s behave similarly. Registering both buffers changes the speed of NCCL's collective by a factor of 0.92
# (slower) at 0.26 MB, 1.48 at 4.2 MB, 1.03 at 67 MB and 0.93 (slower) at 268 MB. With only the receive buffer
# registered, the factors at the last two sizes are 1.26 and 1.23 (device times of
# `benchmarks/results/2026-11-28-gpu.json`, commit 6b142c512aef). This is NCCL 2.28.9, whose symmetric kernels do not
# wait for the kernel before them (notebook 2), which can make their times too short. Multicast plays no part in this,
# because its kernels need more than two ranks.


# %% e7-task [markdown]
# ### Exercise 7 · Where a gain ends
#
# **Goal** Two algorithms are described by lines (alpha in µs, beta in µs per byte). Write `break_even_bytes`, which
# returns the size above which `slow` takes at most `gain` times as long as `fast`. If the ratio is above `gain` for all
# large sizes, there is no such size: return `math.inf`. If it never exceeds `gain`, return 0.
#
# **Example** `slow` takes 20 µs + 3·10⁻⁶ µs per byte, and `fast` takes 10 µs + 3·10⁻⁶ µs per byte.
# `break_even_bytes((20, 3e-6), (10, 3e-6), 1.25)` is 10⁷ bytes: at that size, the times are 50 and 40 µs.
#
# **About** 7 minutes, ★★★

# %% e7
import math


def break_even_bytes(slow, fast, gain):
    """Return the size above which slow takes at most `gain` times as long as fast."""
    # >>> your code
    #: return math.inf
    saved_us = slow[0] - gain * fast[0]  # gained by the smaller alpha
    lost_us_per_byte = gain * fast[1] - slow[1]  # lost again with each byte
    if lost_us_per_byte <= 0:
        return 0.0 if saved_us <= 0 and lost_us_per_byte == 0 else math.inf
    return max(0.0, saved_us / lost_us_per_byte)
    # <<<


# %% e7-check
lesson.check_break_even(break_even_bytes)

# %% e7-mutant-no-edges
import math


def break_even_bytes(slow, fast, gain):
    return (slow[0] - gain * fast[0]) / (gain * fast[1] - slow[1])


# %% e7-mutant-parallel-lines
import math


def break_even_bytes(slow, fast, gain):
    lost_us_per_byte = gain * fast[1] - slow[1]
    if lost_us_per_byte <= 0:
        return math.inf
    return max(0.0, (slow[0] - gain * fast[0]) / lost_us_per_byte)


# %% e7-mutant-only-alpha
import math


def break_even_bytes(slow, fast, gain):
    return max(0.0, (slow[0] - fast[0]) / ((gain - 1) * fast[1]))


# %% e7-help [markdown]
# Write the equation slow(S) = gain · fast(S). Which side grows faster with S?
#
# ---
# a₁ + b₁S = g·a₂ + g·b₂S, so S = (a₁ − g·a₂) / (g·b₂ − b₁). Both differences can be negative.
#
# ---
# If g·b₂ − b₁ is negative, the ratio stays above `gain` for large sizes: `math.inf`. If it is 0, the sign of a₁ −
# g·a₂ decides between 0 and `math.inf`. Otherwise the answer is `max(0.0, …)`.
#
# ---
# **Why** A gain in alpha fades as 1/S, and a gain in beta remains. For every speedup, ask whether it comes from
# alpha or from beta. Also ask whether both times are lines at all: those of NCCL's ring above are not.
#
# **Another way** Bisect over the size with the ratio of the two times. This needs no algebra, and it works for curves
# too.

# %% clocks-text [markdown]
# ### Host or device?
#
# Which algorithm should an engine choose, if the answer depends on how you measure? A call on a GPU takes time in two
# places. The *host* checks the arguments, allocates memory and launches kernels. The *device* then runs the kernels. A
# Python loop that waits after each call measures both. A serving engine captures the kernels in a CUDA graph once, and
# replays the graph, so it pays only for the device.
#
# {glossary: call time; device time; copy engine}
#
# The record of two H100s from section 7 contains both clocks, for these variants:
#
# | variant | what each rank does | registered buffers |
# |---|---|---|
# | `NCCL`, `NCCL both` | the collective alone | none; send and receive |
# | `seed`, `seed both` | SGLang's pipeline in plain torch: pad, the collective, strip, reorder | none; send and receive |
# | `padded`, `padded_symm` | the same pipeline in cpkit, with its checks | none; send and receive |
# | `copy engine` | copy engines copy each shard into each peer's buffer, where max_rank_len rows are reserved for it, so no `pad` is needed; then strip, reorder | receive |
# | `direct` | stores every row at its final position | receive |
# | `plan` | `direct`, prepared once | receive |

# %% clocks-predict
lesson.predict("clocks", ...)

# %% clocks
from cpkit_lessons import gpu_clocks

at_2_mb = record.table[record.table["size_bytes"] == 2_091_008].set_index("variant")
compared = ["seed", "seed both", "padded", "padded_symm", "direct", "plan"]
call_us, device_us = at_2_mb["call_us"], at_2_mb["time_us"]
call_ratio = call_us["padded_symm"] / call_us["seed"]
print(f"padded_symm / seed by call time: {call_ratio:.2f}")
figures.show(gpu_clocks.two_clocks(record, 2_091_008, compared))

# %% clocks-reveal
lesson.reveal("clocks", device_us["padded_symm"] / device_us["seed"])

# %% clocks-after [markdown]
# The two clocks rank the variants in different orders. At this size, call time mostly reflects how much the host does
# for each variant. `seed` is four lines of torch, and the host launches a kernel for each. `padded_symm` launches as
# many; in addition its ranks check that their calls match, and allocate in the pool. `direct` has these checks too, but
# launches a single kernel. On the device the order of `seed` and `padded_symm` is reversed: NCCL selects its symmetric
# kernel for `padded_symm`, and the ring for `seed`.
#
# So compare algorithms by device time. Use call time only to say how long an eager caller waits. On GPUs, the sweep and
# the panel compare by device time, and show both. `lab.clock` returns both; its `times_us` are call times. Where ranks
# share a GPU and symmetric memory is switched off, the rows go through the host, and there is only call time. On CPUs
# there is only one clock, because the host is the device.

# %% beside-text [markdown]
# ### Beside other work
#
# Does a fast gather slow down the model? A gather rarely runs alone: on another *stream* (a second queue of kernels on
# the same GPU), the model multiplies matrices. Both need *multiprocessors* (the cores of a GPU) and memory. The same
# record also has the times of each gather of 67 MB while a matrix product runs. `NCCL only` is the collective without
# pad, strip and reorder.

# %% beside
neighbours = ["seed", "NCCL", "NCCL both", "copy engine", "direct", "plan"]
figures.show(gpu_clocks.beside_product(record, neighbours))

# %% beside-after [markdown]
# Alone, `plan` takes 103 µs and `copy engine` 234 µs. Beside the product, they take 262 and 639 µs, 2.5 and 2.7 times
# as long. But `plan` and `copy engine` lose that time in different places. The kernel of `plan` shares the
# multiprocessors with the product. The transfer of `copy engine` uses none of them: in the same record, copies to the
# other GPU, without strip and reorder, take 92 µs when no product runs, and 93 µs beside it. So most of the delay must
# be in its kernels, above all strip and reorder.
#
# And what does the product lose? It loses 102 µs beside `plan`, about as long as that gather takes alone: the kernel of
# `plan` occupies multiprocessors while it waits for the link. Beside `copy engine` the product loses 126 µs, about half
# of the time of that gather alone. Beside `seed` it loses most, 243 µs. So measure both sides: in general, the delay of
# the product is not the time of the gather.

# %% kernels-text [markdown]
# ### What NCCL really did
#
# How do you know that your buffers took the fast path? The result looks the same on either path, so you have to ask
# NCCL. Notebook 2 predicts the path from buffer, group, offset and version. NCCL reports its choice only in its log
# (`NCCL_DEBUG=INFO`, `NCCL_DEBUG_SUBSYS=TUNING`). `lab.explain(…, observe=True)` switches this log on for a single
# gather, and returns what NCCL selected.
#
# With one GPU per rank, the cell after the question observes your own NCCL. Otherwise it shows a record of four H100s
# with NCCL 2.28.9: five sizes, each with no registered buffer (`padded`), with only the receive buffer registered
# (`padded_symm_recv`), and with both (`padded_symm`).

# %% kernels-predict
lesson.predict("kernels", ...)

# %% kernels
from cpkit_lessons import nccl_choices

recorded = nccl_choices.recorded()
live = nccl_choices.live(lab, cp)  # None, unless each rank has a GPU of its own
choices = recorded if live is None else live
print(choices.source)
choices.table

# %% kernels-reveal
symmetric = recorded.table["observed"].str.startswith("symmetric")
lesson.reveal("kernels", recorded.table[symmetric]["algorithm"].nunique())

# %% kernels-check
observed_path = choices.table["observed"].str.split(":").str[0]
assert (observed_path == choices.table["predicted"]).all(), "the rule of notebook 2 holds"

# %% kernels-after [markdown]
# In every row, `observed` agrees with `predicted`: the rule of notebook 2 holds. (In the recorded log, the smallest
# size has 65,536 bytes per rank: 125 tokens, padded to 32 rows on each of 4 ranks.) Read the names of the kernels too:
#
# - `AllGather_ST` is a symmetric kernel that *stores* into the windows of its peers. (`AllGather_LL` is the one for
#   small messages.)
# - `RING LL` and `RING SIMPLE` are NCCL's ring with two protocols: LL has the lower latency, and SIMPLE the higher
#   bandwidth. The ring changes from LL to SIMPLE as the size grows, so no single line fits its time. With only the
#   receive buffer registered, NCCL 2.28.9 keeps the ring. So the factors 1.26 and 1.23 above, with the receive buffer
#   only, are gains of the ring and not of a symmetric kernel.
# - NCCL's *channels* are not those of notebook 2: each is one thread block on a multiprocessor. In the record of four
#   H100s, the symmetric kernel needs 5 to 9 of them, and the ring 16 to 24. So the symmetric kernel leaves more of the
#   GPU to other kernels.
#
# To see a kernel in a profile, search for `ncclSymkDevKernel_…` (symmetric) or `ncclDevKernel_…` (ring).

# %% s10 [markdown]
# ## 10. Live
#
# Would you trust these conclusions on another workload? Now change it yourself. Every change starts a new measurement
# on the same workers. Things to try:
#
# 1. Move **cp_size**. The total number of bytes stays the same. Does the time? (cp_size can be at most the number of
#    your workers. `make lab NPROC=8` starts 8 of them.)
# 2. Switch on more **algorithms**. They are measured in turn, so load on the machine largely cancels in the ratio to
#    the first one. Which of them are clearly faster than `padded`?
# 3. Untick **symmetric memory**. Which paths does the panel show now, and what would make them symmetric?
# 4. Select the preset `small: 64 tokens`. Which algorithm wins when S is tiny?
# 5. Let the panel measure for 10 s, and press **Pin as A**. Change one setting, wait for 10 s again, and read the
#    verdict on B.
#
# A slider moves with the arrow keys, and the space bar switches an algorithm on or off. The tables show the plotted
# values. *Copy code* copies the settings as Python code, and *CSV* and *JSON* save the samples. While the panel
# measures, other cells compete for the same cores, so the last cell of this section stops it (press **Start** to
# resume).

# %% panel
from cpkit.notebook.explorer import Explorer

lengths = [traced + 1, traced // 5]
panel = Explorer(lab, lengths, cp_size=cp, algorithms=["padded", "direct"])
panel.start()
panel

# %% panel-check
panel.wait(samples=3)
padded, direct = panel.samples[-2:]
assert direct.workload.cp_size == cp
assert padded.path != direct.path == "symmetric"
panel.controls.cp_size.value = cp // 2  # as if you had moved the slider
sample = panel.wait(samples=3)
assert sample.workload.cp_size == len(sample.per_rank_us) == cp // 2
panel.controls.cp_size.value = cp

# %% still-text [markdown]
# The panel needs a running Jupyter kernel. This picture shows what it displays:

# %% still tags=["nbval-ignore-output"]
panel.wait(samples=10)
figures.show(panel.panel.still())
for sample in panel.samples[-2:]:
    print(sample)
panel.stop()

# %% s11 [markdown]
# ## 11. Beyond one machine, by the model
#
# What changes with 72 GPUs, or with two nodes? You probably do not have them, so `cpkit_lessons.cost_presets` contains
# such machines as models: time = start + bytes that each GPU receives / rate. The start is their alpha. Between nodes,
# the network adapter of every GPU receives one eighth of the other node's rows, while NVLink distributes them inside
# the node. The slower of the two transfers counts. All rates of NVLink follow from one number, the 328 GB/s that NCCL
# reached on 8 H100 (section 2). A Blackwell GPU gets twice that, because NCCL's own cost model gives its NVLink twice
# the rate of Hopper's.
#
# **All numbers of this section are modelled. None was measured here.** The cell after the question prints the constants
# of the models, with their sources or the word "assumed".

# %% nodes-predict
lesson.predict("nodes", ...)

# %% nodes-sources
from cpkit_lessons.cost_presets import PRESETS

for name, machine in PRESETS.items():
    network = f", network {machine.network_gbps:.0f} GB/s per GPU" if machine.network_gbps else ""
    print(f"{name}: start {machine.start_us:g} µs, NVLink {machine.wire_gbps:g} GB/s{network}")
    print("   ", "; ".join(machine.sources))

# %% nodes
nvl72, two_nodes = PRESETS["NVL72 GB200"], PRESETS["2 nodes of 8 H100"]
ratios = {}
for size in (1 * MB, 256 * MB):
    one_us, two_us = (place.predict_us("direct", size, 16) for place in (nvl72, two_nodes))
    ratios[size] = two_us / one_us
    print(f"{size / MB:3.0f} MB modelled: NVL72 {one_us:.0f} µs, two nodes {two_us:.0f} µs")
gain = two_nodes.symmetric_gain(1 * MB, 16)
print(f"gain of symmetric memory over two nodes: {gain:.2f} × (this model assumes no gain there)")

# %% nodes-reveal
lesson.reveal("nodes", ratios[256 * MB])

# %% nodes-figure
spans = {name: range(1, 4) for name in PRESETS} | {"NVL72 GB200": range(1, 7)}
spans["2 nodes of 8 H100"] = range(4, 5)  # 16 GPUs; 2 to 8 of them would fit in one node
curves = [
    {"machine": name, "cp_size": 1 << power, "size_bytes": size}
    | {"time_us": PRESETS[name].predict_us("direct", size, 1 << power)}
    for size in (1 * MB, 256 * MB)
    for name, powers in spans.items()
    for power in powers
]
figures.show(figures.scale_out(pd.DataFrame(curves)))

# %% nodes-text [markdown]
# Ask which *term* of the model dominates. Over the two nodes, it is alpha at 1 MB, the fixed cost of the network. At
# 256 MB it is the bytes, and NVLink is the slower transfer: the network alone would need 356 µs instead of 683. Within
# one NVLink, the number of ranks hardly matters from cp_size 8 on, because (cp−1)/cp of S is almost S. At 256 MB, the
# time grows by three quarters from 2 to 8 ranks.
#
# The model lets NVLink and the network overlap completely, and it contains no contention. So trust the shape of the
# curves, not their third digit. It also assumes no symmetric kernels between nodes. NCCL has had them for all-gathers
# since 2.29.2, and a second kind since 2.29.7 (`sym_kernels.cc`).

# %% s12 [markdown]
# ## 12. Recorded elsewhere, beside yours
#
# Is your machine typical? `make bench` records its measurements together with the machine, the date and the commit.
# Here are those records. Two of them are drawn beside your sweep: the newest CPU record, and a GPU record, both of as
# many ranks as yours. The GPU record has one GPU per rank, if there is such a record. Open marks are recorded, and
# filled marks are yours. The subtitle of each figure names its record.

# %% recorded tags=["nbval-ignore-output"]
known = recordings.read()
print(recordings.describe(known))
for recording in recordings.newest(known, cp):
    figures.show(recordings.beside(table, recording, cp))

# %% recorded-text [markdown]
# Compare shapes, not heights: up to which size does the time hardly grow on each machine, and what is the order of the
# algorithms?
#
# In a record with a GPU per rank, the thin black line is the time in which every rank copies its shard to each peer. It
# was measured, and it is not a bound: in the record of four GPUs (drawn only if you have 4 ranks), `direct` is faster
# at every size except 1 MB. `low-contention` is torch's `_low_contention_all_gather`, whose copies use no
# multiprocessors, followed by strip and reorder. A record with a single GPU is drawn only if there is no other. No byte
# crosses a link there, and the thin black line is the time that the memory of that GPU needs.
#
# On GPUs, the *call time* of small gathers also contains the launch of kernels. A record with a GPU per rank shows
# device time, without the launch. `plan` is `direct`, prepared once and called many times (`plan_gather_kv`), and on a
# GPU it replays a captured graph. So their device times differ little, and their call times much.

# %% s13 [markdown]
# ## 13. A report that others can repeat
#
# Could a stranger reproduce your number? Give them the machine, the versions, the commit, the date, the method, the
# samples, the spread and the code. The next cell writes the report: one page that needs no network, and a JSON file
# with the same data.

# %% repeat
repeat = f"""import cpkit
with cpkit.connect(nproc={lab.world_size}) as lab:
    print(lab.sweep(sizes_bytes={sizes}, cp_sizes=[{cp}],
                    algorithms={algorithms}, iterations=5, tensors=1))
"""
print(repeat)

# %% report tags=["nbval-ignore-output"] budget_s=60
from cpkit_lessons import report

results = {
    "alpha_us": alpha_us,
    "beta_us_per_byte": us_per_byte,
    f"light_us_at_{sizes[-1]}_bytes": light[sizes[-1]],
}
roof = figures.roof(light, table)
print("writing the report …")
page, data = report.write(
    reports, lab.status(), table, repeat=repeat, results=results, figures=[roof]
)
print(f"{page}, {data}: {len(table)} rows")

# %% report-check
import json

content = json.loads(data.read_text())
assert len(content["sweep"]) == len(table)
assert {"commit", "torch", "cores", "date"} <= content["environment"].keys()
assert "http" not in page.read_text(), "the page loads nothing from the network"

# %% progress
lesson.progress()

# %% end [markdown]
# ## What to remember
#
# - Compute the speed of light first. A time below it means that the clock or the bound is wrong.
# - Put a barrier before the clock, warm up, take the slowest rank and the median, and measure variants in turn. Leave
#   one out, and the result can be wrong, even by a factor of 10 or more.
# - alpha is a fixed cost, mostly synchronization and, on a CPU, Python; beta is bytes. What symmetric memory gains
#   depends on the size. On two H100s with both buffers registered, the gain is largest near 4 MB and almost absent at
#   67 MB. At 0.26 and 268 MB, symmetric memory is slower. On the same two H100s, `plan` is 1.9 to 2.8 times as fast as
#   SGLang's pipeline, depending on the size. The passes alone make that pipeline take 1.2 to 1.9 times as long as its
#   collective (`benchmarks/results/2026-11-28-gpu.json`, commit 6b142c512aef).
# - Compare algorithms by device time. For small gathers, call time mostly reflects how much Python runs.
# - The result of a gather does not show which kernel NCCL selected. NCCL's log does.
# - Count passes before you write a kernel.
#
# **Five questions** (answers below)
# 1. A colleague reports 900 GB/s algbw over links of 360 GB/s, with 8 ranks. What do you ask first?
# 2. Two variants differ by 4 %, and the spread of each is 10 %. Which one is faster?
# 3. Your kernel halves alpha. Which users notice, and which do not?
# 4. Why can fewer bytes take longer?
# 5. Which rank's time do you report?
#
# <details><summary>Answers</summary>
#
# 1. Did the clock wait for the end? busbw would be 788 GB/s, more than the links can carry.
# 2. Unknown. Measure both in turn, with more iterations, and compare pair by pair.
# 3. Users with small messages notice. In large messages, the bytes hide alpha.
# 4. Many short copies: each of them has an alpha.
# 5. The slowest, in each iteration.
#
# </details>
#
# **You can now read** nccl-tests' `doc/PERFORMANCE.md`; `benchmark/benchmark_all_gather_matmul.py` in
# meta-pytorch/kraken; the tables of Megatron-LM#5596 and SGLang#17756; NCCL's cost model in `sym_kernels.cc`; torch's
# `_inductor/comm_analysis.py`.
#
# **An open problem** No serving engine whose source we have read gathers ragged KV straight to its final position yet:
# vLLM#49517, #52863 and #57115 are open. In cpkit, `all_gather_kv(…, into=, slots=)` writes into a paged cache
# (notebook 2). What would it take to *quantize* on the way, so that FP8 crosses the wire and no byte is copied twice?
# Count the passes first.
