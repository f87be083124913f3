"""Tensors without plain memory: every collective is right, or raises ValueError on every rank.

Rank 0 passes them and its peers pass ordinary tensors, so that a rank that fails on its own would
leave the others waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks.fuzz.ranks import deadline
from cpkit import provenance
from cpkit.gather import (
    ALGORITHMS,
    all_gather_kv,
    cp_all_gather_reorganized_into_tensor_kv_cache,
    cp_all_gather_rerange_kv_cache,
)
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import plan_gather_kv
from cpkit.symm import explain_path, use_symmetric_memory
from tests.ranks.device import DEVICE, pool_of, shard_rows, world_group

Make = Callable[[torch.Tensor], torch.Tensor]
IN_RANK_ORDER = cp_all_gather_reorganized_into_tensor_kv_cache
IN_TOKEN_ORDER = cp_all_gather_rerange_kv_cache
ROWS = 8


class Plain(torch.Tensor):
    """A subclass with ordinary memory."""


class Raising(torch.Tensor):
    """A subclass that refuses every torch function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("no torch function here")


class Wrapper(torch.Tensor):
    """A wrapper without memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("no dispatch here")


def distributed(x: torch.Tensor) -> torch.Tensor:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    return DTensor.from_local(x, mesh, run_check=False)


def fake(x: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


def read_only(x: torch.Tensor) -> torch.Tensor:
    array = x.cpu().numpy().copy()
    array.setflags(write=False)
    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(array).to(DEVICE)


def jagged(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)


RIGHT: dict[str, Make] = {
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "plain subclass": lambda x: x.as_subclass(Plain),
    "shared memory": lambda x: x.share_memory_(),
    "buffer": torch.nn.Buffer,
    "read-only numpy": read_only,
}
REFUSED: dict[str, Make] = {
    "distributed": distributed,
    "masked": lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "fake": fake,
    "meta": lambda x: x.to("meta"),
    "on another device": lambda x: x.to("cpu" if DEVICE == "cuda" else "meta"),
    "functional": torch._to_functional_tensor,
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((1, 1)),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[:3], x[3:]]),
    "jagged": jagged,
    "quantized": lambda x: torch.quantize_per_tensor(x.float().nan_to_num(), 1.0, 0, torch.qint8),
    "two tensors": lambda x: TwoTensor(x, x),
    "wrapper": Wrapper,
    "uninitialized": lambda x: torch.nn.UninitializedParameter(requires_grad=False),
    "uninitialized buffer": lambda x: torch.nn.UninitializedBuffer(),
    "raising": lambda x: x.as_subclass(Raising),
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "freed": freed,
}


@dataclass
class Batch:
    """One batch of 8 rows per rank; a call receives one tensor of it that may be odd."""

    group: CPGroup
    metadata: ContextParallelMetadata
    rows: torch.Tensor

    @property
    def slots(self) -> torch.Tensor:
        return torch.arange(self.metadata.total_tokens, device=DEVICE)

    @property
    def whole(self) -> torch.Tensor:
        """A new cache or output in the pool."""
        with use_symmetric_memory(self.group):
            return torch.empty(self.metadata.total_tokens, 8, device=DEVICE)

    def gather(self, x: Any, algorithm: str) -> list[torch.Tensor]:
        return all_gather_kv([x], self.metadata, self.group, algorithm=algorithm)

    def into(self, cache: Any, slots: Any, algorithm: str = "padded") -> list[torch.Tensor]:
        options = {"algorithm": algorithm, "into": [cache], "slots": slots}
        return all_gather_kv([self.rows], self.metadata, self.group, **options)

    def sglang(self, call: Any, x: Any) -> list[torch.Tensor]:
        state = SimpleNamespace(attn_cp_metadata=self.metadata)
        return [call(x, self.metadata.total_tokens, self.group.size, state)]

    def shards(self, output: Any, x: Any) -> list[torch.Tensor]:
        self.group.cp_all_gather_into_tensor_async(output, x)
        return [output]


# Which tensor of the batch is odd, and the call that receives it.
CALLS: dict[str, tuple[str, Callable[[Batch, Any], Any]]] = {
    **{name: ("rows", partial(Batch.gather, algorithm=name)) for name in ALGORITHMS},
    "cache": ("whole", lambda at, x: at.into(x, at.slots)),
    "cache of direct": ("whole", lambda at, x: at.into(x, at.slots, "direct")),
    "slots": ("slots", lambda at, x: at.into(at.whole, x)),
    "slots of direct": ("slots", lambda at, x: at.into(at.whole, x, "direct")),
    "plan": ("rows", lambda at, x: plan_gather_kv([x], at.metadata, at.group)()),
    "rank order": ("rows", lambda at, x: at.sglang(IN_RANK_ORDER, x)),
    "token order": ("rows", lambda at, x: at.sglang(IN_TOKEN_ORDER, x)),
    "input": ("rows", lambda at, x: at.shards(at.whole, x)),
    "output": ("whole", lambda at, x: at.shards(x, at.rows)),
    "send": ("rows", lambda at, x: explain_path(x, at.whole, at.group)),
    "recv": ("whole", lambda at, x: explain_path(at.rows, x, at.group)),
    "peer_view": ("whole", lambda at, x: pool_of(at.group).peer_view(x, 0)),
}


def ordinary() -> tuple[Batch, CPGroup]:
    """Return a batch, and a group that is in step whatever the calls on the batch do."""
    harness, group = init_context_parallel(dist.get_world_size(), "harness"), world_group()
    metadata = prepare_context_parallel_metadata([ROWS * group.size], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
    return Batch(group, metadata, rows), harness


def outcomes(make: Make) -> Iterator[tuple[str, list[str]]]:
    """Yield each call and what it did on each rank: "right", "refused", or what was wrong."""
    at, harness = ordinary()
    for name, (which, call) in CALLS.items():
        x = getattr(at, which)
        try:
            odd = make(x.clone() if which != "whole" else x)  # on every rank, so that all skip it
        except (RuntimeError, IndexError, NotImplementedError):
            continue
        said = outcome(at, partial(call, at, odd if at.group.rank == 0 else x), name)
        yield name, [answer.decode() for answer in harness.exchange(said.encode()[:800])]


def outcome(at: Batch, call: Callable[[], Any], name: str) -> str:
    try:
        with deadline(5):
            got = call()
    except ValueError as error:
        return "refused" if len(str(error)) > 40 else f"a short message: {error}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is wrong
        return f"{type(error).__name__}: {error}"
    if not isinstance(got, list):
        return "right"
    (result,) = got
    order = at.metadata.rank_order if name in ("rank order", "input", "output") else slice(None)
    whole = torch.empty(at.metadata.total_tokens, 8)
    whole[order] = result.detach().as_subclass(torch.Tensor).cpu()
    is_own = name in ("cache", "cache of direct", "output")
    if not is_own and type(result) is not torch.Tensor:
        return f"a {type(result).__name__}"
    return provenance.explain_mismatch(whole, at.metadata, round=1) or "right"


def faults(table: dict[str, Make], allowed: set[str]) -> str:
    """Return what was not allowed, or differed between the ranks. `peer_view` is local."""
    found = []
    for kind, make in table.items():
        for name, said in outcomes(make):
            relevant = set(said[:1] if name == "peer_view" else said)
            if len(relevant) > 1 or not relevant <= allowed:
                found.append(f"{kind}, {name}: {said}")
    return "\n".join(found)


def check_tensors_with_memory_are_gathered_whatever_their_class() -> None:
    """`direct` accepts a cache, and peer_view a tensor, only if it is still in the pool."""
    found = faults(RIGHT, {"right", "refused"})
    assert not found, found


def check_tensors_without_plain_memory_are_refused_on_every_rank() -> None:
    found = faults(REFUSED, {"refused"})
    assert not found, found


def check_calls_inside_transforms_are_refused_on_every_rank() -> None:
    """Inside vmap and grad, tensors have no address."""
    at, harness = ordinary()
    for name, (which, call) in CALLS.items():
        if which != "rows" or name == "send":
            continue
        for inside in (
            lambda call=call: [torch.vmap(lambda x: call(at, x)[0])(at.rows[None])],
            lambda call=call: [torch.func.grad(lambda x: call(at, x)[0].sum())(at.rows)],
        ):
            said = outcome(at, inside if at.group.rank == 0 else partial(call, at, at.rows), name)
            answers = {answer.decode() for answer in harness.exchange(said.encode()[:800])}
            assert answers == {"refused"}, (name, answers)
