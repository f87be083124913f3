"""The directory of a set of workers: who may read it, who holds it, which settings fail."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpkit.control import launcher
from cpkit.control.errors import ControlError
from cpkit.control.runtime_dir import (
    NameTaken,
    RuntimeDir,
    remove_socket_dir,
    write_private,
)
from cpkit.control.settings import Launch, address_of, from_json, loopback
from cpkit.processes import process_id
from tests.helpers.control_server import connection
from tests.helpers.processes import until


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    place = RuntimeDir("here")
    place.create()
    return place


def test_what_is_written_is_private_and_comes_back(place: RuntimeDir) -> None:
    assert stat.S_IMODE(place.directory.stat().st_mode) == 0o700
    assert place.connection() is None
    write_private(place.connection_file, connection())
    assert stat.S_IMODE(place.connection_file.stat().st_mode) == 0o600
    assert place.connection() == connection()
    assert [path.name for path in place.directory.iterdir()] == ["connection.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_file_that_others_can_reach_is_refused_with_the_cure(
    place: RuntimeDir, mode: int
) -> None:
    write_private(place.connection_file, connection())
    place.connection_file.chmod(mode)
    with pytest.raises(ControlError, match=f"mode {mode:04o}.*chmod 600"):
        place.connection()


def test_a_link_is_not_followed(place: RuntimeDir, tmp_path: Path) -> None:
    write_private(tmp_path / "elsewhere", connection())
    place.connection_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ControlError, match=r"symbolic|Too many"):
        place.connection()


def test_a_directory_that_others_may_write_to_is_refused(place: RuntimeDir) -> None:
    place.directory.chmod(0o777)
    with pytest.raises(ControlError, match=r"0777.*chmod 700"):
        place.create()


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "here"}', b"\x80\x04]."])
def test_a_file_that_is_no_connection_file_is_refused(place: RuntimeDir, content: bytes) -> None:
    place.connection_file.touch(mode=0o600)
    place.connection_file.write_bytes(content)
    with pytest.raises(ControlError, match="not a connection file"):
        place.connection()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-rf", "x" * 65, "a b", "é"])
def test_names_are_plain_words(name: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        RuntimeDir(name)


def test_a_name_is_taken_exactly_as_long_as_its_holder_lives(place: RuntimeDir) -> None:
    code = "import sys, time; from cpkit.control.runtime_dir import RuntimeDir"
    code += "; RuntimeDir('here').acquire_lock(); print(1); sys.stdout.flush(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert place.is_locked()
        with pytest.raises(NameTaken, match=r"run already.*stop"):
            place.acquire_lock()
        holder.kill()
        holder.wait()
    assert not place.is_locked()
    os.close(place.acquire_lock())


def test_only_our_own_kind_of_directory_is_removed(tmp_path: Path) -> None:
    others = tmp_path / "precious"
    ours = tmp_path / "cpkit-abc"
    link = tmp_path / "cpkit-link"
    others.mkdir()
    ours.mkdir()
    link.symlink_to(others)
    for directory in (others, ours, link):
        remove_socket_dir(str(directory))
    assert others.exists()
    assert not ours.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Launch(nproc=0), "--nproc is 0"),
        (Launch(nnodes=2, node_rank=2, rdzv_endpoint="a:1"), "node ranks go from 0"),
        (Launch(nnodes=2), "host:port"),
        (Launch(nnodes=2, rdzv_endpoint="a:http"), "host:port"),
        (Launch(max_restarts=-1), "--max-restarts"),
        (Launch(share_gpu=True, device="cpu"), "contradict each other"),
        (Launch(interface="no-such0"), "this machine has .*"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_words(settings: Launch, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings.check()


def test_settings_survive_the_journey_to_the_agent() -> None:
    settings = Launch(name="x", nproc=3, owner=process_id())
    settings.check()
    assert from_json(settings.to_json()) == settings


def test_nodes_that_share_a_home_have_places_of_their_own() -> None:
    assert Launch(name="x").place_name == "x"
    assert Launch(name="x", nnodes=2, node_rank=1).place_name == "x.node1"


def test_an_interface_has_an_address() -> None:
    assert address_of(loopback()) == "127.0.0.1"
    assert address_of("10.1.2.3") == "10.1.2.3"


def test_each_step_of_a_start_renews_the_deadline(
    place: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "READY_S", 0.2)
    patience = launcher._Patience(place)
    for step in ("importing torch", "joining the process group"):
        place.set_startup_phase("rank 0", step)
        assert not patience.is_over(), "slow is not stuck"
        time.sleep(0.3)
    until(patience.is_over)
    assert "within 0.2 s (rank 0: joining the process group)" in patience.words()


def test_a_process_is_alive_until_it_is_a_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        identity = process_id(child.pid)
        assert identity.is_alive()
        child.kill()
        until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert not identity.is_alive()
    assert not identity.is_alive()
