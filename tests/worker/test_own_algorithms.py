"""A user's file of algorithms that is refused before a gather; tests/ranks has the gathers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpkit.control.launch_options import Launch
from cpkit.memory.path import PathReport
from cpkit.worker import own_algorithms

GOOD = "def mine(tensors, metadata, memory): ...\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    return file


def names(source: str) -> list[str]:
    return list(own_algorithms._functions("mine.py", source.encode()))


def test_only_public_functions_of_the_file_are_algorithms() -> None:
    imported = "from cpkit.gather import padded\nimport torch\n"
    assert names(imported + GOOD + "def _helper(x): ...\nclass Table: ...\n") == ["mine"]
    assert names(GOOD + "def helper(x): ...\n__all__ = ['mine']") == ["mine"]
    assert names("from cpkit.gather import padded as mine\n__all__ = ['mine']") == ["mine"]
    assert names("def mine(rows, layout, pool, *, tile=8): ...") == ["mine"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (GOOD.replace("mine", "direct"), "'direct' cannot be the name .* padded, .* plan, barrier"),
        (GOOD.replace("mine", "plan"), "'plan' cannot be the name"),
        (GOOD.replace("mine", "copy"), "'copy' cannot be the name"),
        (GOOD.replace("mine", "_mine") + "__all__ = ['_mine']", "does not begin with _"),
        ("def mine(tensors, metadata): ...", r"mine\(tensors, metadata\) has a wrong signature"),
        ("def mine(a, b, c, d): ...", r"mine\(tensors, metadata, memory\)"),
        ("def mine(*, tensors, metadata, memory): ...", "wrong signature"),
        ("__all__ = ['mine']", "__all__ has 'mine', which is None and no function"),
        (GOOD + "__all__ = 'mine'", "__all__ is 'mine'; it must be a list of names"),
        (GOOD + "__all__ = ['my ring']", "it must be a list of names"),
        ("mine = 5\n__all__ = ['mine']", "__all__ has 'mine', which is 5 and no function"),
        ("from cpkit.gather import padded", "no public function"),
        ("def _mine(tensors, metadata, memory): ...", "no public function"),
    ],
)
def test_a_file_without_usable_functions_is_refused(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        names(source)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o622])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_file_that_others_can_change_is_refused(file: Path, mode: int, what: str) -> None:
    path = file if what == "file" else file.parent
    path.chmod(mode | 0o100)
    with pytest.raises(ValueError, match=rf"{path} .* mode 0\d+.*chmod go-w {path}$"):
        Launch(algorithms=str(file)).check()
    path.chmod(0o755)
    Launch(algorithms=str(file)).check()


def test_a_sticky_file_protects_nothing(file: Path) -> None:
    file.chmod(0o1666)
    with pytest.raises(ValueError, match=r"mode 1666.*chmod go-w"):
        Launch(algorithms=str(file)).check()


@pytest.mark.parametrize("path", [("ring", "why", "a", "b"), ("fallback", None, "a", "b")])
def test_a_report_with_a_wrong_field_is_refused(path: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"PathReport is wrong .*'staged', 'fallback'"):
        own_algorithms._check_path(PathReport(*path))
    own_algorithms._check_path(PathReport("fallback", "why", "a", "b"))


def test_a_sticky_directory_protects_a_file(file: Path) -> None:
    file.parent.chmod(0o1777)
    Launch(algorithms=str(file)).check()


def test_a_file_of_another_user_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(file, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ValueError, match="another user can decide what the workers run"):
        Launch(algorithms=str(file)).check()


def test_what_is_no_file_is_refused(file: Path) -> None:
    (file.parent / "link.py").symlink_to(file)
    os.mkfifo(file.parent / "pipe.py")
    for name in ("missing.py", "link.py", "pipe.py", "."):
        with pytest.raises(ValueError, match=r"must be|cannot be read"):
            Launch(algorithms=str(file.parent / name)).check()


def test_nodes_with_different_files_are_refused() -> None:
    same = [b"/a/mine.py 01", b"/b/mine.py 01"]
    own_algorithms._check_digests(same)
    own_algorithms._check_digests([b"none ", b"none "])
    words = r"rank\(s\) 0, 1: /a/mine.py 01; rank\(s\) 2: /b/mine.py 02"
    with pytest.raises(ValueError, match=words):
        own_algorithms._check_digests([b"/a/mine.py 01", b"/a/mine.py 01", b"/b/mine.py 02"])
    with pytest.raises(ValueError, match=r"rank\(s\) 1: none"):
        own_algorithms._check_digests([b"/a/mine.py 01", b"none "])
