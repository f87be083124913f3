# %% title [markdown]
# # 3 · All-gather performance
#
# Four algorithms give the same bytes. How much time does each take, and where does it go? Here you measure on the
# real workers, with the units of nccl-tests, and then turn the knobs live.
#
# **Time** 30 minutes. **Needs** any laptop: the times are those of *this* machine's memory, not of a GPU.
# **Know before** notebooks 1 and 2.
#
# You will be able to
# 1. convert a time into algbw and busbw, and say what each is good for;
# 2. read a sweep: where latency counts, where bandwidth counts;
# 3. say which pass costs how much, and which algorithm drops it;
# 4. predict what a change of cp_size does, and check it live.
#
# | symbol | meaning | unit |
# |---|---|---|
# | S | all gathered bytes: cp_size × bytes of a rank | B |
# | t | time of the gather on the *slowest* rank, median | µs |
# | algbw | S / t | GB/s (10⁹ B/s) |
# | busbw | algbw · (cp−1)/cp: what the links really carry | GB/s |

# %% connect tags=["nbval-ignore-output"]
import cpkit

lab = cpkit.connect()
status = lab.status()
print(f"{status.world_size} ranks on {status.device}, torch {status.torch_version}")
print("symmetric memory:", status.symmetric_backend)

# %% setup
from cpkit.notebook import figures

cp = max(size for size in lab.cp_sizes if size <= 4)
algorithms = ["padded", "padded_symm_recv", "padded_symm", "direct"]
assert cp == 4, f"the text below speaks of 4 ranks; these workers can form {lab.cp_sizes}"


# %% s1 [markdown]
# ## 1. Units first
#
# 33.6 MB are gathered by 4 ranks in 20 ms. Which bandwidth is that? Each rank already *has* a quarter. So the links
# carry only three quarters of S. That is busbw. It is the number to compare with the hardware.


# %% units
def algbw_gbps(size_bytes, time_us):
    return size_bytes / time_us / 1000


def busbw_gbps(size_bytes, time_us, cp_size):
    return algbw_gbps(size_bytes, time_us) * (cp_size - 1) / cp_size


busbw = busbw_gbps(33.6e6, 20_000, cp_size=4)
print(f"algbw {algbw_gbps(33.6e6, 20_000):.2f} GB/s, busbw {busbw:.2f} GB/s")
assert abs(busbw - 1.26) < 1e-9

# %% s2 [markdown]
# ## 2. One gather, on a clock
#
# All ranks read the same clock, so their stages can be laid side by side. First the classic pipeline.

# %% trace-padded tags=["nbval-ignore-output"]
padded = lab.trace(4096, cp, algorithm="padded")
assert set(padded.table["rank"]) == set(range(cp))
figures.show(figures.timeline(padded.table, "padded"))

# %% trace-direct-text [markdown]
# Now `direct`: every rank writes its rows at their final place, once. Mind the axis.

# %% trace-direct tags=["nbval-ignore-output"]
direct = lab.trace(4096, cp, algorithm="direct")
assert not {"pad", "strip", "reorder"} & set(direct.table["stage"]), "those passes are gone"
figures.show(figures.timeline(direct.table, "direct"))

# %% s3 [markdown]
# ## 3. A sweep
#
# One gather says little. Take several sizes and all four algorithms. The rows of one size are measured in turn,
# so a disturbance hits all of them alike. Guess first: by what factor does `direct` win at 16 MB?

# %% sweep tags=["nbval-ignore-output"]
sizes = [64 << 10, 512 << 10, 4 << 20, 16 << 20]
table = lab.sweep(sizes_bytes=sizes, cp_sizes=[cp], algorithms=algorithms, iterations=10)
assert len(table) == len(sizes) * len(algorithms)
names = "size_bytes count type algorithm time_us algbw_gbps busbw_gbps path"
table[names.split()].round(2)

# %% sweep-check
row = table.iloc[0]
expected = busbw_gbps(row["size_bytes"], row["time_us"], row["cp_size"])
assert abs(row["busbw_gbps"] - expected) < 1e-6 * expected, "the table uses the same units"
largest = table[table["size_bytes"] == table["size_bytes"].max()].set_index("algorithm")
assert largest.loc["direct", "time_us"] < largest.loc["padded", "time_us"]

# %% sweep-figure tags=["nbval-ignore-output"]
figures.show(figures.latency_bandwidth(table))
ratio = largest.loc["padded", "time_us"] / largest.loc["direct", "time_us"]
print(f"at {largest['size_bytes'].iloc[0]:,} B direct is {ratio:.1f} times as fast as padded")


# %% sweep-text [markdown]
# On the left end time hardly depends on size: that is *latency*, the cost of meeting. On the right end it grows with
# size: that is *bandwidth*. Fewer passes help on the right. Fewer meetings help on the left.

# %% s4 [markdown]
# ## 4. Where the time goes
#
# The same gather, cut into its stages. `padded` pays for the collective *and* for three copies. `padded_symm` keeps two
# of the copies. `direct` keeps none.


# %% stages tags=["nbval-ignore-output"]
def one_sample(algorithm):
    return next(iter(lab.measure(8192, cp, algorithm=algorithm, samples=1)))


samples = [one_sample(name) for name in algorithms]
assert [sample.workload.algorithm for sample in samples] == algorithms
figures.show(figures.stage_split(samples))

# %% stages-check
stages = {sample.workload.algorithm: set(sample.stage_us) for sample in samples}
assert {"strip", "reorder"} <= stages["padded"] & stages["padded_symm"]
assert not {"pad", "strip", "reorder"} & stages["direct"]

# %% s5 [markdown]
# ## 5. Live
#
# Now turn the knobs. Every change measures anew, on the same workers. Things to try:
#
# 1. Move **cp_size**. Total bytes stay the same. Does the time?
# 2. Switch **algorithm** from `direct` to `padded` and back.
# 3. Untick **symmetric memory**: what does the path say?
# 4. Take the small preset. Which algorithm wins when S is tiny?
#
# The sliders obey the arrow keys. The table beside the plot says the same in numbers.

# %% panel
from cpkit.notebook.explorer import Explorer

panel = Explorer(lab, lengths=[4097, 812], cp_size=cp)
panel.start()
panel

# %% panel-check
sample = panel.wait(samples=3)
assert sample.workload.cp_size == cp
assert sample.path == "symmetric"
panel.controls.cp_size.value = 2  # as if you had moved the slider
sample = panel.wait(samples=3)
assert sample.workload.cp_size == len(sample.per_rank_us) == 2
panel.controls.cp_size.value = cp

# %% still-text [markdown]
# The panel needs a running kernel. This is a picture of what it shows:

# %% still tags=["nbval-ignore-output"]
sample = panel.wait(samples=15)
figures.show(panel.panel.still())
print(f"{sample.time_us:.0f} µs, busbw {sample.busbw_gbps:.2f} GB/s, path {sample.path}")

# %% end [markdown]
# ## What to remember
#
# - Compare busbw with the hardware, t with your latency budget. Always say which.
# - The slowest rank is the time of the gather.
# - Passes over the data cost bandwidth; meetings cost latency. `direct` has one pass and two meetings.
#
# **You can now read** nccl-tests' `PERFORMANCE.md`, and the timings in SGLang's pull requests.
