"""The cost model counts bytes, recovers known costs from times, and reproduces published data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cost_fit import Measured, describe, fit, nonnegative_least_squares
from cpkit.cost import FEATURES, PASSES, Host, HostModel, features, traffic
from cpkit.gather import ALGORITHMS
from cpkit_lessons.cost_presets import COPY_PASSES, PRESETS, Preset, ring_factor

HOST = Host(cores=2, cache_bytes=32 << 20)
SIZES = tuple(2048 * tokens for tokens in (256, 1024, 2048, 8192, 16384, 65536))
H100 = PRESETS["8 H100, NVLink"]


def test_every_algorithm_is_counted() -> None:
    assert {*ALGORITHMS, "plan"} == PASSES.keys()
    assert set(ALGORITHMS) == COPY_PASSES.keys()


@pytest.mark.parametrize(
    ("algorithm", "wire", "copied"),
    [
        ("direct", 5 * 1000, 0),
        ("padded_symm", 5 * 1200, 2 * 1200 + 2 * 4 * 1000 + 2 * 4 * 1000),
        ("padded_symm_recv", 5 * 1200, 2 * 1200 + 2 * 4 * 1000 + 2 * 4 * 1000),
        ("padded", (4 * 3 + 2) * 1200, 2 * 1200 + 2 * 4 * 1000 + 2 * 4 * 1000),
    ],
)
def test_bytes_of_four_ranks(algorithm: str, wire: int, copied: int) -> None:
    got = traffic(algorithm, 1000, 4, padded_bytes=1200)
    assert (got.wire_bytes, got.copied_bytes) == (wire, copied)


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of padded"):
        traffic("ring", 1000, 4)
    with pytest.raises(ValueError, match="must be one of"):
        H100.predict_us("ring", 1000, 4)


@given(st.sampled_from(sorted(PASSES)), st.integers(1, 1 << 30), st.sampled_from([2, 4, 8]))
def test_direct_moves_least_and_more_ranks_move_more(algorithm: str, size: int, cp: int) -> None:
    moved = traffic(algorithm, size, cp).moved_bytes
    assert moved >= traffic("direct", size, cp).moved_bytes == (cp + 1) * size
    assert traffic(algorithm, size, 2 * cp).moved_bytes > moved


@given(st.integers(0, 1000))
def test_nonnegative_least_squares_is_no_worse_than_any_subset(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(8, 4)), rng.normal(size=8)
    got = nonnegative_least_squares(matrix, target)
    assert (got >= 0).all()
    residual = np.linalg.norm(matrix @ got - target)
    for columns in itertools.chain.from_iterable(
        itertools.combinations(range(4), n) for n in range(1, 5)
    ):
        part = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
        if (part >= 0).all():
            other = np.linalg.norm(matrix[:, columns] @ part - target)
            assert residual <= other + 1e-9


def machine_of_known_costs() -> HostModel:
    costs = (12.0, 1 / 30e3, 1 / 9e3, 1 / 2e3, 1 / 4e3)
    return HostModel(HOST, dict.fromkeys(("direct", "padded"), costs))


def sweep(model: HostModel, cp_sizes: tuple[int, ...], sizes: tuple[int, ...]) -> list[Measured]:
    return [
        Measured(name, size, cp, model.predict_us(name, size, cp))
        for name in model.coefficients
        for size in sizes
        for cp in cp_sizes
    ]


def test_a_fitted_model_predicts_more_ranks_and_other_sizes() -> None:
    truth = machine_of_known_costs()
    model = fit(sweep(truth, (2, 4), SIZES[::2]), HOST)
    for point in sweep(truth, (2, 4, 8), SIZES):
        got = model.predict_us(point.algorithm, point.total_bytes, point.cp_size)
        assert got == pytest.approx(point.time_us, rel=0.15)


def test_the_model_includes_contention_for_cores() -> None:
    """Negative control: a model of the same machine with many cores predicts badly."""
    truth = machine_of_known_costs()
    blind = fit(sweep(truth, (2, 4), SIZES[::2]), Host(cores=64, cache_bytes=32 << 20))
    errors = [
        blind.predict_us(p.algorithm, p.total_bytes, p.cp_size) / p.time_us - 1
        for p in sweep(truth, (8,), SIZES)
    ]
    assert max(map(abs, errors)) > 0.35


def test_costs_are_described_by_name() -> None:
    said = describe(machine_of_known_costs())["direct"]
    assert said["start_us"] == 12.0
    assert said["far_gbps"] == pytest.approx(9.0)
    assert len(features("direct", 1000, 2, HOST)) == len(FEATURES)


def test_nothing_to_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        fit([], HOST)


@pytest.mark.parametrize(
    ("mebibytes", "symmetric_us", "ring_us"),
    [(2, 10.9, 20.2), (8, 27.4, 43.4), (32, 95.3, 118.9), (128, 363.2, 385.3)],
)
def test_upstreams_figures_on_8_h100(mebibytes: int, symmetric_us: float, ring_us: float) -> None:
    """NVIDIA/Megatron-LM#5596."""
    size = mebibytes << 20
    assert H100.predict_us("direct", size, 8) == pytest.approx(symmetric_us, rel=0.02)
    assert H100.collective_us(size, 8, symmetric=False) == pytest.approx(ring_us, rel=0.02)
    assert H100.symmetric_gain(size, 8) == pytest.approx(ring_us / symmetric_us)


def test_the_gain_of_symmetric_memory_falls_with_size() -> None:
    measured = {size: ring_factor(size << 20) for size in (2, 8, 32, 128)}
    assert measured == pytest.approx({2: 1.853, 8: 1.584, 32: 1.248, 128: 1.061}, abs=0.001)
    assert ring_factor(16 << 20) == pytest.approx((1.584 + 1.248) / 2, abs=0.001)  # halfway in log
    assert ring_factor(1) == ring_factor(2 << 20)
    assert ring_factor(1 << 40) == ring_factor(128 << 20)
    assert H100.symmetric_gain(24 << 20, 8) > H100.symmetric_gain(48 << 20, 8)


@pytest.mark.parametrize(("cp_size", "ratio"), [(8, 0.87), (4, 1.01), (2, 1.52)])
def test_four_copies_after_the_gather_cost_as_much_as_the_wire(cp_size: int, ratio: float) -> None:
    machine = Preset("8 GPUs", 8, 5.0, 360, 3_800, ("an example",))
    size = 1 << 27
    got = machine.copies_us(size, 4) / machine.wire_us(size, cp_size)
    assert got == pytest.approx(ratio, abs=0.01)


def test_two_nodes_are_bound_by_the_network_without_a_gain_from_symmetric_memory() -> None:
    nodes = PRESETS["2 nodes of 8 H100"]
    size = 1 << 27
    assert nodes.wire_us(size, 8) == pytest.approx(size * 7 / 8 / 328e3)
    foreign_us = size / 2 / 8 / 45e3
    assert nodes.wire_us(size, 16) == pytest.approx(max(foreign_us, size * 14 / 16 / 328e3))
    assert nodes.symmetric_gain(size, 16) == 1.0
    assert H100.predict_us("direct", size, 8) < nodes.predict_us("direct", size, 16)
    slow = Preset("slow network", 16, 30, 328, 2900, ("an example",), 8, 10.0)
    assert slow.wire_us(size, 16) == pytest.approx(size / 2 / 8 / 10e3)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_marked_as_modelled_and_name_their_sources(preset: Preset) -> None:
    assert preset.modelled
    assert len(preset.sources) >= 3
    with pytest.raises(ValueError, match="supports cp_size 1 to"):
        preset.predict_us("direct", 1000, preset.max_cp_size + 1)
