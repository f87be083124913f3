"""Redirected factories return the tensors that torch would return, in the given memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from cpkit.memory import factory

X = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "zeros": lambda: torch.zeros(2, 3),
    "ones of a size": lambda: torch.ones((2, 3), dtype=torch.bool),
    "full": lambda: torch.full((3,), 7),
    "full by keyword": lambda: torch.full(size=(3,), fill_value=2.5),
    "zeros_like, strided": lambda: torch.zeros_like(X.transpose(0, 2)),
    "ones_like": lambda: torch.ones_like(X, dtype=torch.int8),
    "full_like": lambda: torch.full_like(X, 3),
    "new_zeros": lambda: X.new_zeros(4, 2),
    "new_ones": lambda: X.new_ones((4, 2)),
    "new_full": lambda: X.new_full((2,), 5),
    "no elements": lambda: torch.zeros(0, 3),
    "a number": lambda: torch.zeros(()),
    "requires_grad": lambda: torch.ones(2, requires_grad=True),
    "channels last": lambda: torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "explicit device": lambda: torch.ones(2, device="cpu"),
}


class Memory:
    """Record every tensor that it returns."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cpu"
        self.tensors.append(torch.empty(0, dtype=dtype).new_empty(tuple(shape)))
        return self.tensors[-1]

    def owns(self, x: torch.Tensor) -> bool:
        return x.untyped_storage().data_ptr() in [
            t.untyped_storage().data_ptr() for t in self.tensors
        ]


@pytest.mark.parametrize("name", CALLS)
def test_a_redirected_factory_equals_the_ordinary_one(name: str) -> None:
    want, memory = CALLS[name](), Memory()
    with factory.redirect(memory):
        got = CALLS[name]()
    assert torch.equal(got, want)
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert got.requires_grad == want.requires_grad
    assert memory.tensors


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.empty(3, 4, dtype=torch.bfloat16),
        lambda: torch.empty((3, 4)),
        lambda: torch.empty_like(X),
        lambda: torch.empty_strided((2, 3), (1, 2)),
        lambda: X.new_empty(5),
        lambda: X.new_empty_strided((2, 3), (3, 1)),
    ],
)
def test_unfilled_factories_are_redirected(call: Callable[[], torch.Tensor]) -> None:
    memory = Memory()
    with factory.redirect(memory):
        got = call()
    assert memory.owns(got)


def test_other_functions_are_not_redirected() -> None:
    memory = Memory()
    with factory.redirect(memory):
        torch.cat([X, X])
        X.clone()
        torch.empty(3, device="meta")
        torch.zeros(3, out=torch.empty(0, device="meta"))
        torch.arange(5)
    assert memory.tensors == []
    torch.empty(3)  # outside the context
    assert memory.tensors == []


def test_a_gpu_of_another_rank_is_not_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    places: list[str] = []

    def place(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
        places.append(device)
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    with factory.redirect(place):
        torch.empty(3, device="cuda:0")
        torch.empty(3, device="cuda")
        with pytest.raises((AssertionError, RuntimeError)):
            torch.empty(3, device="cuda:63")
    assert places == ["cuda", "cuda"]
