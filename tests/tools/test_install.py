"""`tools.install` accepts only files whose hash is known."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from tools import install
from tools.lock import FOLLOWS_TORCH, HASHES, LOCK


def tiny_wheel(folder: Path) -> Path:
    """Write the wheel of a package with one empty module."""
    wheel, info = folder / "tiny-1.0-py3-none-any.whl", "tiny-1.0.dist-info"
    files = {
        "tiny.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
            record += f"{name},sha256={digest.decode()},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", record)
    return wheel


@pytest.mark.workers  # runs pip
@pytest.mark.parametrize("hash_is_right", [True, False])
def test_a_file_with_another_hash_is_not_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    hash_is_right: bool,
) -> None:
    content = tiny_wheel(tmp_path).read_bytes() if hash_is_right else b"another file"
    tiny_wheel(tmp_path)
    hashes = tmp_path / "hashes"
    hashes.write_text(
        f"# Two lines.\ntiny==1.0 \\\n    --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"
    )
    only_here = ["--no-index", f"--find-links={tmp_path}", f"--target={tmp_path / 'site'}"]
    monkeypatch.setattr(install, "PIP", (sys.executable, "-m", "pip", "install", *only_here))
    monkeypatch.setattr(install, "requirements", lambda _: ["tiny"])
    monkeypatch.setattr(install, "resolved", lambda *_: ["tiny==1.0"])
    monkeypatch.setattr(install, "ROOT", tmp_path)  # is no project, so that the last step fails
    assert install.main(["test"], hashes) != 0
    assert (tmp_path / "site" / "tiny.py").exists() is hash_is_right
    assert ("DO NOT MATCH THE HASHES" in capfd.readouterr().err) is not hash_is_right


def test_a_package_without_a_hash_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "resolved", lambda *_: ["torch==2.13.0", "unknown==1"])
    monkeypatch.setattr(install, "run", pytest.fail)
    assert install.main(["test"]) == 1
    assert "unknown==1 is not in requirements.hashes: run make lock" in capsys.readouterr().err


def test_every_locked_package_has_hashes() -> None:
    hashed = dict(install.hashed_lines(HASHES.read_text()))
    locked = {line for line in LOCK.read_text().splitlines() if not line.startswith("#")}
    assert locked <= hashed.keys()
    assert all("--hash=sha256:" in lines for lines in hashed.values())
    assert not any(map(FOLLOWS_TORCH.match, hashed))
