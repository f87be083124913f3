"""The copies that `make lab` opens: unmodified ones follow their originals; work is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jupyterlab_server.settings_utils import get_settings

from cpkit.notebook import workspace
from tests.helpers import ROOT

NAME = "01.ipynb"


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / NAME).write_text("first")
    (folder / "02.ipynb").write_text("other")
    return folder


@pytest.fixture
def copies(tmp_path: Path, originals: Path) -> Path:
    folder = tmp_path / "workspace"
    assert workspace.refresh(originals, folder) == []
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.ipynb")}


def test_copies_are_created_once(originals: Path, copies: Path) -> None:
    assert contents(copies) == {NAME: "first", "02.ipynb": "other"}
    (copies / NAME).write_text("my work")
    assert workspace.refresh(originals, copies) == []
    assert contents(copies) == {NAME: "my work", "02.ipynb": "other"}


def test_an_unmodified_copy_follows_its_original(originals: Path, copies: Path) -> None:
    (originals / NAME).write_text("second")
    (message,) = workspace.refresh(originals, copies)
    assert message.startswith(f"workspace/{NAME} was updated")
    assert contents(copies) == {NAME: "second", "02.ipynb": "other"}
    assert workspace.refresh(originals, copies) == []


def test_a_modified_copy_is_kept_and_each_new_version_is_stored_beside_it(
    originals: Path, copies: Path
) -> None:
    (copies / NAME).write_text("my work")
    for version, name in (
        ("second", "01.new.ipynb"),
        ("third", "01.new2.ipynb"),
        ("fourth", "01.new3.ipynb"),
    ):
        (originals / NAME).write_text(version)
        (message,) = workspace.refresh(originals, copies)
        assert message.startswith(f"workspace/{NAME} was kept")
        assert f"workspace/{name}" in message
        assert contents(copies)[name] == version
        assert workspace.refresh(originals, copies) == [], "the message is shown once"
    assert contents(copies)[NAME] == "my work"
    assert contents(copies)["01.new.ipynb"] == "second"


@pytest.mark.parametrize("record", [None, "{", "[]", "\xff"])
def test_without_a_record_nothing_is_overwritten(
    originals: Path, copies: Path, record: str | None
) -> None:
    file = copies / ".originals.json"
    file.unlink() if record is None else file.write_text(record, encoding="latin-1")
    (originals / NAME).write_text("second")
    (message,) = workspace.refresh(originals, copies)
    assert "was kept" in message
    assert contents(copies) == {NAME: "first", "01.new.ipynb": "second", "02.ipynb": "other"}


def test_a_deleted_copy_or_one_replaced_by_the_new_version_follows_again(
    originals: Path, copies: Path
) -> None:
    (copies / NAME).write_text("my work")
    (originals / NAME).write_text("second")
    workspace.refresh(originals, copies)
    (copies / "01.new.ipynb").rename(copies / NAME)
    (copies / "02.ipynb").unlink()
    assert workspace.refresh(originals, copies) == []
    (originals / NAME).write_text("third")
    assert "was updated" in workspace.refresh(originals, copies)[0]
    assert contents(copies) == {NAME: "third", "02.ipynb": "other"}


def test_missing_originals_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clone the repository, and run `make lab`"):
        workspace.refresh(tmp_path, tmp_path / "workspace")
    assert list(tmp_path.iterdir()) == []


def test_git_ignores_all_files_of_a_learner() -> None:
    """Copies, reports and checkpoints are ignored, also those beside the originals."""
    made = ["workspace/01.ipynb", "workspace/.originals.json", "workspace/reports/report.html"]
    made += ["notebooks/reports/report.html", "notebooks/.ipynb_checkpoints/01-checkpoint.ipynb"]
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    said = subprocess.run(
        ["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.stdout.split() == made
    assert workspace.WORKSPACE == ROOT / "workspace", "beside notebooks/: relative links still work"


def test_jupyterlab_uses_the_defaults_that_disable_its_news_popup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plugin = "@jupyterlab/apputils-extension:notification"
    schemas = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"

    def default() -> str:
        answer, _ = get_settings(str(tmp_path), str(schemas), str(tmp_path), schema_name=plugin)
        return answer["schema"]["properties"]["fetchNews"]["default"]

    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("JUPYTER_CONFIG_PATH", raising=False)
    assert default() == "none", "JupyterLab asks by default"
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(workspace.JUPYTER_DEFAULTS))
    assert default() == "false"


def test_a_workspace_that_cannot_be_written_is_an_error_with_the_remedy(originals: Path) -> None:
    with pytest.raises(ValueError, match=r"Not a directory.*clone cpkit to a directory"):
        workspace.refresh(originals, originals / NAME / "workspace")
