"""What clients may hold in the pools, each and together, and what requests need beside that."""

from __future__ import annotations

import msgspec
import pytest

from cpkit.control.messages import (
    Clock,
    Explain,
    Gather,
    Measure,
    Pool,
    Sweep,
    Trace,
    Workload,
)
from cpkit.worker import limits
from cpkit.worker.limits import MemoryInUse, check, check_room, check_share, needed, needed_bytes

A, B, C = b"a", b"b", b"c"
SMALL, LARGE = Workload(2, (64,)), Workload(2, (4096,))


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_limit_bytes", lambda: 1000)


def allocate(nbytes: int) -> Pool:
    return Pool(2, "allocate", nbytes=nbytes)


def test_a_client_may_hold_half_of_the_limit() -> None:
    held = {(A, 2): 300, (A, 1): 100, (B, 2): 50}
    check_share(allocate(50), A, held)
    with pytest.raises(ValueError, match=r"keeps 102 bytes.*holds 400 bytes.*may hold 500 bytes"):
        check_share(allocate(51), A, held)
    check_share(allocate(150), B, held)
    check_share(Pool(2, "release"), A, {(A, 2): 5000})
    check_share(Pool(2), A, {(A, 2): 5000})


def test_all_clients_may_hold_three_quarters() -> None:
    held = {(A, 2): 400, (B, 1): 300}
    check_share(allocate(25), C, held)
    with pytest.raises(MemoryInUse, match=r"keeps 52 bytes.*all clients hold 700 bytes .* 750"):
        check_share(allocate(26), C, held)


def test_a_new_arena_replaces_what_its_pool_held() -> None:
    held = {(A, 2): 400, (B, 2): 100, (B, 1): 200}
    check_share(Pool(2, "configure", prealloc_bytes=250), A, held)
    check_share(Pool(2, "configure"), A, held)
    with pytest.raises(ValueError, match="may hold"):
        check_share(Pool(2, "configure", prealloc_bytes=251), A, held)
    with pytest.raises(ValueError, match="may hold"):
        check_share(Pool(1, "configure", prealloc_bytes=200), A, held)
    warm_up = Pool(2, "warm_up", max_tokens=8, heads=1, head_dim=8, dtype="uint8", tensors=1)
    with pytest.raises(ValueError, match=r"keeps 2048 bytes"):  # twice two blocks of 256 per rank
        check_share(warm_up, A, {})


def test_a_request_must_fit_beside_what_clients_hold() -> None:
    check_room(600, 400)
    with pytest.raises(MemoryInUse, match=r"needs about 601 bytes.*hold 400 bytes.* 1000 bytes"):
        check_room(601, 400)


def test_a_request_needs_the_memory_of_its_largest_workload() -> None:
    assert needed(Gather(SMALL)) == needed_bytes(SMALL) < needed_bytes(LARGE)
    assert needed(Sweep((SMALL, LARGE, SMALL))) == needed_bytes(LARGE)
    assert needed(Clock(SMALL, ("copy",))) > needed(Gather(SMALL))
    plan = msgspec.structs.replace(SMALL, algorithm="plan")
    kept_bytes = 2 * plan.cp_size * plan.total_bytes  # two outputs on every rank
    for of_plans in (
        lambda n: Measure((plan,) * n),
        lambda n: Sweep((plan,) * n),
        lambda n: Clock(SMALL, ("plan",) * n),
    ):
        assert needed(of_plans(16)) == needed(of_plans(1)) + 15 * kept_bytes
    captured = msgspec.structs.replace(SMALL, captured=True)
    assert needed(Measure((captured,) * 3)) == 3 * needed_bytes(SMALL), "each keeps its rows"
    assert needed(Measure((SMALL,) * 3)) == needed_bytes(SMALL)
    assert needed(allocate(100)) == 0, "check_share counts it"


@pytest.mark.parametrize("request_type", [Gather, Trace, Explain, Clock])
def test_only_measurements_are_captured(
    request_type: type[Gather | Trace | Explain | Clock],
) -> None:
    captured = msgspec.structs.replace(SMALL, captured=True)
    body = Clock(captured, ("copy",)) if request_type is Clock else request_type(captured)
    with pytest.raises(ValueError, match="only measure and sweep replay captures"):
        check(body, 2)
    for measured in (Measure((captured,)), Sweep((captured,))):
        with pytest.raises(ValueError, match=r"run on the CPU.*device=\"cuda\""):
            check(measured, 2)
