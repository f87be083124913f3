"""Ranks that a cell starts for one function, and the record of NCCL's selections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cpkit_lessons import nccl_choices
from cpkit_lessons.own_ranks import in_ranks


def ranks_and_size(group):
    return [group.rank, group.size]


def fails_on_rank_1(group):
    if group.rank == 1:
        raise ValueError("no rows on rank 1")


@pytest.mark.workers
def test_each_rank_runs_the_function_and_returns_its_own_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", "never")  # of the workers: it does not reach these ranks
    assert in_ranks(ranks_and_size, 2) == [[0, 2], [1, 2]]
    assert capsys.readouterr().out == "Starting 2 ranks for this cell …\n"


@pytest.mark.workers
def test_a_rank_that_fails_is_named_with_its_error() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed: .*ValueError: no rows on rank 1"):
        in_ranks(fails_on_rank_1, 2)


def test_the_record_of_nccls_choices_agrees_with_the_text_of_notebook_3() -> None:
    choices = nccl_choices.recorded()
    assert choices.source.startswith("Recorded on 4 x NVIDIA H100 80GB HBM3 with NCCL 2.28.9, 2026")
    assert "commit a958ed4" in choices.source
    observed = choices.table["observed"]
    assert (observed.str.split(":").str[0] == choices.table["predicted"]).all()
    assert set(choices.table["size_bytes"]) == set(nccl_choices.SIZES_BYTES)
    channels = observed.str.extract(r"(\d+) channels")[0].astype(int)
    symmetric = observed.str.startswith("symmetric")
    assert (channels[symmetric].min(), channels[symmetric].max()) == (5, 9)
    assert (channels[~symmetric].min(), channels[~symmetric].max()) == (16, 24)
    assert set(choices.table[symmetric]["algorithm"]) == {"padded_symm"}
    assert observed[~symmetric].str.contains("RING LL|RING SIMPLE").all()


def test_nccl_is_observed_only_where_each_rank_has_a_gpu() -> None:
    workers = (SimpleNamespace(host="here", device="cuda:0"),) * 2
    shared = SimpleNamespace(world_size=2, device="cuda", workers=workers)
    assert nccl_choices.live(SimpleNamespace(status=lambda: shared), 2) is None
