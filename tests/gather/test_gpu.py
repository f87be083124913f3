"""Gathers of 2, 4 and 8 ranks on one shared GPU, with and without MPS, or on one GPU each.

Also NCCL, and the workers.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cpkit
from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control import mps
from cpkit.control.messages import Sample
from cpkit.timing import DEVICE_TIME
from tests.helpers import ROOT
from tests.helpers.launch import assert_passed
from tests.helpers.processes import until
from tests.ranks.device_time import contradictions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"
    ),
]
RANKS = [int(n) for n in os.environ.get("CPKIT_TEST_GPU_RANKS", "2,4,8").split(",")]
# Without MPS the GPU switches between the ranks every few milliseconds, so there are fewer rounds.
ROUNDS = {"mps": "1000", "turns": "60", "own": "1000"}
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


# One launch runs all of them in this order; after the last check of `cuda` its ranks disagree.
MODULES = (
    *("gathers", "caches", "plans", "signals", "threads", "odd_tensors"),
    *("cuda_pool", "cuda_order", "cuda"),
)


def checks(*modules: str) -> list[str]:
    """Return the names of the checks from the sources; importing some modules needs a GPU."""
    sources = [(ROOT / "tests" / "ranks" / f"{name}.py").read_text() for name in modules]
    return [
        line.removeprefix("def ").partition("(")[0]
        for source in sources
        for line in source.splitlines()
        if line.startswith("def check_")
    ]


@pytest.fixture(scope="module", params=["mps", "turns", "own"])
def sharing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Yield how ranks use the GPUs: one for all, with or without an MPS daemon, or one each."""
    if request.param != "mps":
        yield request.param
        return
    if not mps.is_installed():
        pytest.skip("nvidia-cuda-mps-control is not installed")
    with mps.serve(tmp_path_factory.mktemp("m")) as words:
        assert "own daemon" in words, words
        yield request.param


def variables(sharing: str) -> tuple[tuple[str, str], ...]:
    chosen = (
        ("CPKIT_TEST_DEVICE", "cuda"),
        ("CPKIT_TEST_ROUNDS", ROUNDS[sharing]),
        ("CPKIT_TEST_SHARING", sharing),
        ("CPKIT_SYMM_PREALLOC_GB", "0.25"),
    )
    return chosen if sharing == "own" else (*chosen, ("CUDA_VISIBLE_DEVICES", one_gpu()))


def one_gpu() -> str:
    """Return the first visible GPU. Call it after an MPS daemon starts, which counts from 0."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file for the times of captured gathers. Skip with fewer than two GPUs."""
    needs_gpus(2)
    return tmp_path_factory.mktemp("captured") / "times.json"


def device_time_variables(captured: Path) -> tuple[tuple[str, str], ...]:
    return (*variables("own"), ("CPKIT_TEST_CAPTURED", str(captured)))


def needs_gpus(count: int) -> None:
    if count > GPUS:
        pytest.skip(f"needs {count} GPUs, one per rank; torch sees {GPUS}")


@pytest.mark.parametrize("nproc", RANKS)
@pytest.mark.parametrize("check", checks(*MODULES))
def test_ranks(sharing: str, check: str, nproc: int) -> None:
    if sharing == "own":
        needs_gpus(nproc)
    modules = ",".join(f"tests.ranks.{name}" for name in MODULES)
    assert_passed(modules, nproc, check, variables(sharing), 550)


@pytest.mark.parametrize(
    "check",
    [
        "check_every_algorithm_is_bit_exact",
        "check_the_path_is_that_of_this_nccls_version",
        "check_the_log_counts_what_nccl_selected",
    ],
)
def test_nccl(check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from cpkit.memory.nccl_log import environment

    log = tmp_path_factory.getbasetemp() / "nccl.log"
    settings = {
        **environment(log),
        "CPKIT_NCCL": "1",
        "CPKIT_SYMM_PREALLOC_GB": "0.25",
        "CPKIT_TEST_DEVICE": "cuda",
        "CUDA_VISIBLE_DEVICES": one_gpu(),
    }
    assert_passed("tests.ranks.nccl", 2, check, tuple(settings.items()), 300)


@pytest.mark.parametrize("nproc", RANKS)
@pytest.mark.parametrize("check", checks("windows"))
def test_nccl_with_a_gpu_per_rank(
    check: str, nproc: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from cpkit.memory.nccl_log import environment

    needs_gpus(nproc)
    log = tmp_path_factory.getbasetemp() / f"nccl-{nproc}.log"
    settings = (*variables("own"), *environment(log).items())
    assert_passed("tests.ranks.windows", nproc, check, settings, 300)


NCCL_SETTINGS = (
    "",
    *("NCCL_WIN_ENABLE=0", "NCCL_WIN_ENABLE=0@1", "NCCL_CUMEM_ENABLE=0"),
    *("NCCL_CTA_POLICY=2", "NCCL_CTA_POLICY=2@1"),
)


@pytest.mark.parametrize("setting", NCCL_SETTINGS)
@pytest.mark.parametrize("check", checks("nccl_settings"))
def test_settings_of_nccl(check: str, setting: str) -> None:
    needs_gpus(2)
    settings = (*variables("own"), ("CPKIT_TEST_NCCL", setting))
    assert_passed("tests.ranks.nccl_settings", 2, check, settings, 300)


def test_explain_shows_what_nccl_selected_beside_the_predicted_path(runtime_dir: Path) -> None:
    needs_gpus(2)
    with cpkit.connect("gpu-explain", nproc=2, device="cuda") as lab:
        for tokens in (64, 65536):
            for algorithm in ("padded", "padded_symm_recv", "padded_symm"):
                table = lab.explain(tokens, 2, algorithm=algorithm, tensors=1, observe=True)
                assert table["observed"][0].startswith(f"{table['path'][0]}: "), table
                kernel = "AllGather_" if table["path"][0] == "symmetric" else "RING "
                assert kernel in table["observed"][0], table
                assert "on rank 0" in table["observed"][1]
            (first, _) = lab.explain(tokens, 2, algorithm="direct", observe=True)["observed"]
            assert "NCCL was not called" in first
        assert "observed" not in lab.explain(64, 2)
        lab.stop()


@pytest.mark.parametrize("check", checks("device_time"))
def test_device_time(check: str, captured: Path) -> None:
    assert_passed("tests.ranks.device_time", 2, check, device_time_variables(captured), 300)


def test_a_sweep_orders_the_algorithms_as_their_captures_do(
    captured: Path, runtime_dir: Path
) -> None:
    check = "check_device_time_orders_gathers_as_their_captures_do"
    assert_passed("tests.ranks.device_time", 2, check, device_time_variables(captured), 300)
    with cpkit.connect("gpu-sweep", nproc=2, device="cuda") as lab:
        for tokens, captured_us in json.loads(captured.read_text()).items():
            table = lab.sweep(lengths=[int(tokens)], cp_sizes=[2], tensors=1)
            assert table["clock"].unique().tolist() == [DEVICE_TIME]
            swept_us = dict(zip(table["algorithm"], table["time_us"], strict=True))
            assert not contradictions(swept_us, captured_us), (swept_us, captured_us)
        lab.stop()


def test_captured_gathers_are_verified_measured_and_released(runtime_dir: Path) -> None:
    names = (*ALGORITHM_CHOICES,)
    with cpkit.connect("gpu-captured", nproc=2, device="cuda") as lab:

        def median_of(captured: bool, tokens: int) -> dict[str, Sample]:
            stream = lab.measure([tokens], algorithms=names, captured=captured, samples=4)
            return {sample.algorithm: sample for sample in stream}

        eager, captured = median_of(False, 512), median_of(True, 512)
        for name, sample in captured.items():
            assert sample.workload.captured
            assert sample.path == eager[name].path, name
            assert sample.clock == DEVICE_TIME
            print(f"{name}: call {eager[name].call_us:.0f} us, captured {sample.call_us:.0f} us")
        assert captured["padded"].call_us < eager["padded"].call_us  # one launch, no Python
        lab.gather([64], cp_size=2)
        before = lab.pool.stats(2)["used_bytes"].tolist()
        free_bytes = []
        for first in (1000, 1100, 1200):  # the first round also fills torch's cache
            for tokens in range(first, first + 8000, 400):
                median_of(True, tokens)
            lab.gather([64], cp_size=2)  # an agreement, which returns what was dropped
            free_bytes.append(torch.cuda.mem_get_info()[0])
        print(f"free after each round: {free_bytes}")
        assert lab.pool.stats(2)["used_bytes"].tolist() == before
        assert free_bytes[0] - free_bytes[-1] < 2**26
        if GPUS < 2:
            with pytest.raises(cpkit.BadRequest, match="go through the host"):
                next(lab.measure([64], cp_size=2, symmetric=False, captured=True))
        assert lab.gather([4097], cp_size=2).checked_rows
        lab.stop()


def test_the_explorer_on_a_gpu(runtime_dir: Path) -> None:
    with cpkit.connect("gpu-explorer", nproc=2, device="cuda") as lab:
        panel = lab.explore([512], algorithms=["padded", "direct", "plan"])
        eager = panel.wait(samples=4)
        until(lambda: "device time" in panel.summary_html and "call time" in panel.summary_html)
        panel.controls.captured.value = True
        captured = panel.wait(samples=4)
        assert (eager.workload.captured, captured.workload.captured) == (False, True)
        assert captured.call_us < eager.call_us
        assert "captured=True" in panel.code
        until(lambda: "captured" in panel.panel.still().layout.title.subtitle.text)
        panel.close()
        lab.stop()


def test_workers_on_a_gpu_and_one_that_is_killed_in_a_gather(runtime_dir: Path) -> None:
    with cpkit.connect("gpu-tests", nproc=4, device="cuda") as lab:
        assert "cuda" in str(lab.status())
        assert lab.status().gpus == min(GPUS, 4)
        for algorithm in ALGORITHM_CHOICES:
            shown = lab.gather([4097, 812], cp_size=4, algorithm=algorithm)
            assert shown is not None
        if GPUS < 4:
            (first, *_) = lab.explain([4097], 4, algorithm="padded_symm", observe=True)["observed"]
            assert "ranks share a GPU" in first
        through_the_host = next(iter(lab.measure([4097], cp_size=4, symmetric=False, samples=1)))
        assert through_the_host.path == "fallback"
        samples = iter(lab.measure([65536], cp_size=4, samples=None))
        next(samples)
        victim = lab.status().workers[2].pid
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(cpkit.WorkersDied, match="rank 2"):
            for _ in samples:
                pass
        assert time.monotonic() - start < 10
    time.sleep(5)  # an MPS daemon needs time after the death of a client
    with cpkit.connect("gpu-tests", nproc=2, device="cuda") as lab:
        lab.gather([4097], cp_size=2)
        lab.stop()
