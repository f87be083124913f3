"""What a `Lab` refuses, with a message and before it allocates anything, and what it accepts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import cpkit
from cpkit.algorithms import ALGORITHMS
from cpkit.lab import Lab

pytestmark = [pytest.mark.workers, pytest.mark.usefixtures("the_workers_stay_usable")]

BAD = [
    (lambda lab: lab.clock(["copy"], [64], on_progress="yes"), "on_progress is 'yes'; pass a func"),
    (lambda lab: lab.gather([64], 3), r"cp_size is 3.*divide the 4 ranks.*1, 2, 4"),
    (lambda lab: lab.gather([64], 0), "cp_size is 0"),
    (lambda lab: lab.gather([64], -2), "cp_size is -2"),
    (lambda lab: lab.gather([64], 8), "cp_size is 8"),
    (lambda lab: lab.put(3), "cp_size is 3"),
    (lambda lab: lab.pool.stats(3), "cp_size is 3"),
    (lambda lab: lab.gather([]), r"lengths is \[\]; .* at least one"),
    (lambda lab: lab.measure([]), r"lengths is \[\]"),
    (lambda lab: lab.measure([64], interval_s="0.1"), "interval_s is '0.1'; it must be a number"),
    (lambda lab: lab.measure([64], samples=2.5), "samples is 2.5; it must be a whole number"),
    (lambda lab: next(lab.measure(64, algorithms=["magic"])), "algorithm is 'magic'; .* one of"),
    (lambda lab: lab.measure(64, algorithms=5), "algorithms is 5; it must be a list"),
    (lambda lab: lab.measure(64, algorithm="plan", algorithms=["direct"]), "either algorithm or"),
    (lambda lab: next(lab.measure(64, algorithms=[])), "number of workloads is 0"),
    (
        lambda lab: next(lab.measure_workloads([lab.workload(64), lab.workload(65)])),
        "differ in more than algorithm, symmetric and captured",
    ),
    (lambda lab: lab.measure_workloads(3), "workloads is 3; it must be a list"),
    (lambda lab: lab.measure_workloads(["direct"]), r"workloads is \['direct'\]; .* Lab.workload"),
    (lambda lab: lab.explore([64], algorithms=[["padded"]]), r"algorithms is \[\['padded'\]\]"),
    (lambda lab: lab.explore([64], interval_s="x"), "interval_s is 'x'; it must be seconds"),
    (lambda lab: lab.explore([64], interval_s=0), "interval_s is 0; it must be seconds, more than"),
    (lambda lab: lab.explore([64], cp_size=3), "cp_size is 3; these workers can form 1, 2"),
    (lambda lab: lab.explore([64], algorithms=["magic"]), r"algorithms is \['magic'\]; .* padded,"),
    (lambda lab: lab.explore([64], captured=True), "captured is True, but these workers run on"),
    (lambda lab: next(lab.measure([64], captured=True)), "captured is True, .* no CUDA graphs"),
    (lambda lab: lab.measure([64], captured=1), "captured is 1; it must be True or False"),
    (lambda lab: lab.explore([64], algorithms=[]), r"algorithms is \[\]; it must be one or more"),
    (lambda lab: lab.explore([64], idle_after_s=float("nan")), "idle_after_s is nan"),
    (lambda lab: lab.gather([64], "4"), "cp_size is '4'; it must be a whole number"),
    (lambda lab: lab.gather([64], symmetric="no"), "symmetric is 'no'; it must be True or False"),
    (lambda lab: lab.gather([0]), "at least one token"),
    (lambda lab: lab.gather([64, -1]), "at least one token"),
    (lambda lab: lab.gather(["64"]), "lengths is"),
    (lambda lab: lab.gather([6.5]), "lengths is"),
    (lambda lab: lab.gather([7], 4), "8 blocks.*Use cp_size=1"),
    (lambda lab: lab.gather([64], algorithm="magic"), "magic"),
    (lambda lab: lab.gather([64], strategy="spiral"), "spiral"),
    (lambda lab: lab.gather([64], dtype="float31"), "float31"),
    (lambda lab: lab.gather([64], heads=0), "heads is 0"),
    (lambda lab: lab.gather([64], tensors=17), "tensors is 17"),
    (lambda lab: lab.gather([1 << 40]), r"needs about \d+ bytes.*limit is \d+ bytes"),
    (lambda lab: next(lab.measure([64], samples=0)), "samples is 0"),
    (lambda lab: next(lab.measure([64], interval_s=-1.0)), "interval_s is -1.0"),
    (lambda lab: next(lab.measure([64], interval_s=float("nan"))), "interval_s is nan"),
    (lambda lab: next(lab.measure([64], interval_s=float("inf"))), "interval_s is inf"),
    (lambda lab: next(lab.measure([64], interval_s=1e10)), "interval_s is 1"),
    (lambda lab: lab.gather([2**70]), r"."),
    (lambda lab: lab.gather([64], round=2**70), r"."),
    (lambda lab: lab.gather([64], round=-1), "round is -1"),
    (lambda lab: lab.gather([64], round=1024), "round is 1024"),
    (lambda lab: lab.gather([64], dtype="\ud800"), r"."),
    (lambda lab: lab.gather([(1 << 20) + 8], 2, heads=1, head_dim=8), "1048576"),
    (lambda lab: lab.put(2, rounds=2**70), r"."),
    (lambda lab: lab.pool.configure(2**70, 2), r"."),
    (lambda lab: lab.sweep(sizes_bytes=["a"]), "sizes_bytes"),
    (lambda lab: lab.sweep(sizes_bytes=[-5]), "sizes_bytes"),
    (lambda lab: lab.sweep(sizes_bytes=[64], cp_sizes=["a"]), "cp_sizes"),
    (lambda lab: lab.sweep(), "either sizes_bytes or lengths"),
    (lambda lab: lab.sweep(lengths=[]), "number of workloads is 0"),
    (lambda lab: lab.sweep(lengths=5), "lengths is 5; it must be a list"),
    (lambda lab: lab.sweep(sizes_bytes=[1000], cp_sizes=[]), r"cp_sizes is \[\]; .* at least one"),
    (lambda lab: lab.sweep(lengths=[64], algorithms=5), "algorithms is 5; it must be a list"),
    (lambda lab: lab.sweep(lengths=[64], iterations=0), "iterations is 0"),
    (lambda lab: lab.pool.allocate(0), "nbytes is 0"),
    (lambda lab: lab.pool.allocate("64"), "nbytes is '64'; it must be a whole number"),
    (lambda lab: lab.pool.allocate(1 << 50), "nbytes is"),
    (lambda lab: lab.pool.allocate(lab.status().memory_limit_bytes * 3 // 8, 2), "a client may ho"),
    (lambda lab: lab.pool.configure(0), "prealloc_bytes is 0"),
    (lambda lab: lab.pool.warm_up(-5), "max_tokens is -5"),
    (lambda lab: lab.put(rounds=0), "rounds is 0"),
    (lambda lab: lab.clock([], [64]), "number of calls is 0"),
    (lambda lab: lab.clock(None, [64]), "calls is None; it must be a list"),
    (lambda lab: lab.clock(["sleep"], [64]), "calls has 'sleep'; it must be one of padded"),
    (lambda lab: lab.clock("sleep", [64]), "calls has 'sleep'; it must be one of padded"),
    (lambda lab: lab.clock(["direct"], [64], late_us="x"), "late_us is 'x'; it must be a number"),
    (lambda lab: lab.clock(["direct"], [64], iterations=1 << 40), "iterations is"),
    (lambda lab: lab.clock(["direct"], [64], warmup=-1), "warmup is -1"),
    (lambda lab: lab.clock(["direct"], [64], late_us=1e9), "late_us is"),
    (lambda lab: lab.clock(["direct"], [1 << 40]), "limit is"),
]


@pytest.mark.parametrize(("ask", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_refused_with_a_message(
    lab: Lab, ask: Callable[[Lab], object], words: str
) -> None:
    with pytest.raises(cpkit.BadRequest, match=words):
        ask(lab)


@pytest.mark.parametrize("name", ["lengths", "algorithms", "interval_s", "strategy"])
def test_the_message_quotes_a_long_value_in_part(lab: Lab, name: str) -> None:
    with pytest.raises(cpkit.BadRequest, match=f"^{name} is ") as refused:
        lab.explore(**{"lengths": [64], name: ["x" * 10] * 1000})
    assert len(str(refused.value)) < 300


def test_an_unknown_parameter_is_a_type_error(lab: Lab) -> None:
    with pytest.raises(TypeError, match="colour"):
        lab.gather([64], colour="red")
    with pytest.raises(TypeError, match="'algorithm'"):  # a sweep has `algorithms`
        lab.sweep(sizes_bytes=[1 << 14], algorithm="direct")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16"])
def test_a_dtype_is_torchs_or_its_name(lab: Lab, dtype: str | torch.dtype) -> None:
    assert lab.workload(64, 2, dtype=dtype).dtype == "bfloat16"
    assert lab.gather(64, 2, dtype=dtype).verified


def test_integers_of_numpy_are_accepted(lab: Lab) -> None:
    assert lab.gather(np.int64(64), np.int64(2), heads=np.int64(2), round=np.int64(3)).verified
    assert len(list(lab.measure(64, samples=np.int64(2), interval_s=np.float32(0.02)))) == 2
    table = lab.sweep(
        sizes_bytes=np.array([1 << 14, 1 << 15]), cp_sizes=np.array([2]), iterations=2
    )
    assert len(table) == 2 * len(ALGORITHMS)


def test_a_refused_gather_is_refused_before_anything_is_allocated(lab: Lab) -> None:
    before = lab.pool.stats()
    with pytest.raises(cpkit.BadRequest, match="limit"):
        lab.gather([1 << 30] * 64)
    assert lab.pool.stats().equals(before)
