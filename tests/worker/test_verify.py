"""A request checks its own gather: one wrong bit anywhere is detected and explained."""

from __future__ import annotations

import pytest
import torch

from cpkit import provenance
from cpkit.control.messages import Workload
from cpkit.worker.workload import DTYPES, Run

WORKLOAD = Workload(2, (9, 6), heads=2, head_dim=5, tensors=2)


class FixedRun(Run):
    """A run whose gather returns given tensors."""

    def gather(self) -> list[torch.Tensor]:
        return self.tensors


def gathered(dtype: str, round_number: int = 3) -> FixedRun:
    layout = WORKLOAD.layout()
    tensors = [
        provenance.expected_rows(layout, (2, 5), DTYPES[dtype], round=round_number, tensor=number)
        for number in range(2)
    ]
    return FixedRun(WORKLOAD, layout, None, 3, tensors)  # type: ignore[arg-type]  # unused


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_gather_passes_and_one_wrong_bit_fails(dtype: str) -> None:
    run = gathered(dtype)
    assert run.verified_gather() is run.tensors
    for tensor in run.tensors:
        last_byte = tensor.view(torch.uint8).reshape(-1)[-1:]
        last_byte ^= 1
        with pytest.raises(provenance.ProvenanceError, match=r"(?s)slot 14 .*1 of 15 rows differ"):
            run.verified_gather()
        last_byte ^= 1
    assert run.verified_gather()


def test_rows_of_an_earlier_round_are_detected() -> None:
    with pytest.raises(provenance.ProvenanceError, match=r"holds round 2.*wanted round 3"):
        gathered("bfloat16", round_number=2).verified_gather()


def test_swapped_tensors_are_detected() -> None:
    run = gathered("float32")
    run.tensors.reverse()
    with pytest.raises(provenance.ProvenanceError, match="tensor 1"):
        run.verified_gather()
