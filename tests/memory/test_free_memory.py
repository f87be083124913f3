"""What limits memory: cgroups of both versions as containers see them, and what the errors say."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from cpkit import doctor
from cpkit.sync import free_memory
from cpkit.sync.free_memory import Limit, explain_refusal, shortage
from cpkit.sync.shm import free_bytes
from cpkit.worker import limits

MIB = 1 << 20
NO_LIMIT_V1 = 9223372036854771712
HERE = {free_memory._machine_key(): 3}


def cgroup(directory: Path, version: int, limit: int | str, used: int, **stat: int) -> None:
    """Write the files of one memory cgroup."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (directory / name).write_text(f"{value}\n")
    lines = [f"{key} {value}\n" for key, value in {"anon": used, **stat}.items()]
    (directory / "memory.stat").write_text("".join(lines))


def free_by_cgroup(proc: Path, path: str, mount: str) -> list[int]:
    """Return the free MiB of each limited level, for a line of `cgroup` and one of `mountinfo`."""
    (proc / "cgroup").write_text(f"3:cpuset:/other\n{path}\n")
    other = "24 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw\n"
    (proc / "mountinfo").write_text(f"{other}{mount}\n")
    return [limit.free_bytes // MIB for limit in free_memory._cgroup_limits(proc)]


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/pod/box", "/"),  # the host's view
        ("/pod/box", "/pod"),  # a container that sees its pod
        ("/box", "/"),  # a namespace that begins at the pod
    ],
)
def test_every_visible_level_of_version_2_counts(tmp_path: Path, path: str, root: str) -> None:
    point = tmp_path / "fs"
    below = point / path.removeprefix(root if root != "/" else "").strip("/")
    cgroup(below, 2, 900 * MIB, 700 * MIB, inactive_file=50 * MIB, active_file=30 * MIB, shmem=MIB)
    if below.parent != point:
        cgroup(below.parent, 2, "max", 9000 * MIB)
    cgroup(point, 2, 2000 * MIB, 1900 * MIB)
    mount = f"31 23 0:28 {root} {point} rw,relatime shared:4 - cgroup2 cgroup2 rw"
    assert free_by_cgroup(tmp_path, f"0::{path}", mount) == [280, 100]


def test_version_1_counts_the_whole_tree_below_and_ignores_no_limit(tmp_path: Path) -> None:
    point = tmp_path / "memory"
    file_cache = {"inactive_file": 1, "total_inactive_file": 60 * MIB, "total_active_file": 4 * MIB}
    cgroup(point / "box", 1, 500 * MIB, 400 * MIB, **file_cache)
    cgroup(point, 1, NO_LIMIT_V1, 9000 * MIB)
    mount = f"35 31 0:32 / {point} rw - cgroup cgroup rw,memory"
    assert free_by_cgroup(tmp_path, "4:memory:/box", mount) == [164]
    docker = f"35 31 0:32 /docker/3f {point}/box ro - cgroup cgroup rw,memory"
    assert free_by_cgroup(tmp_path, "4:memory:/docker/3f", docker) == [164]


@pytest.mark.parametrize("path", ["0::/../sibling", "0::/gone", "0::/"])
def test_a_cgroup_that_is_not_mounted_leaves_the_levels_that_are(tmp_path: Path, path: str) -> None:
    cgroup(tmp_path / "fs", 2, 100 * MIB, 200 * MIB)  # above its limit
    mount = f"31 23 0:28 / {tmp_path}/fs rw - cgroup2 cgroup2 rw"
    assert free_by_cgroup(tmp_path, path, mount) == [0]
    assert free_by_cgroup(tmp_path, path, "") == []


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit this process to 90 MiB; return that."""
    limit = Limit("box", 90 * MIB, "the box has 90 MiB", "Get a larger box")
    monkeypatch.setattr(free_memory, "_cgroup_limits", lambda *_: [limit])
    return limit.free_bytes


def test_the_demand_of_all_ranks_that_share_a_limit_is_summed(container: int) -> None:
    two = {"box": 2, **HERE}  # the third rank has a box of its own
    assert shortage(two, container // 2, 0) == ""
    assert shortage(two, 20 * MIB, 25 * MIB) == ""
    assert shortage(two, 20 * MIB, 26 * MIB) == (
        "the box has 90 MiB, and 2 rank(s) need 46.0 MiB (48234496 bytes) each. Get a larger box"
    )
    assert "3 rank(s) need" in shortage(HERE, container // 2, 0)  # a limit that is new


def test_all_who_ask_for_free_memory_see_the_limit(container: int) -> None:
    assert free_bytes() == container
    assert limits.memory_limit_bytes.__wrapped__() == container // 2
    (box, _) = doctor._free_memory()
    assert box == ("memory limit, the tightest", "the box has 90 MiB", "Get a larger box")
    assert "the memory limits leave 0.1 GiB" in next(doctor._shared_memory()).found


def test_memory_that_the_system_refuses_is_explained_by_its_limit(container: int) -> None:
    refused = OSError(errno.ENOMEM, "no memory")
    assert "the box has 90 MiB. Get a larger box" in explain_refusal(refused)
    assert "the box" in explain_refusal(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert explain_refusal(OSError(errno.ENOENT, "no file")) == ""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, before[1]))
    try:
        assert "limited to 1024.0 GiB (1099511627776 bytes)" in explain_refusal(refused)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
