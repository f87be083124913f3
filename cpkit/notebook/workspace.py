"""Update the learner's copies of the notebooks, which `make lab` opens instead of the originals.

An unmodified copy is updated when its original changes. A modified copy is never overwritten: the
new version is stored beside it as NAME.new.ipynb. A deleted copy is created again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from cpkit.os_errors import describe

ROOT = Path(__file__).parents[2]
WORKSPACE = ROOT / "workspace"  # beside notebooks/, so that relative links find the same files
# For JUPYTER_CONFIG_PATH: labconfig/ has defaults for JupyterLab, which a user may override, and
# voila.json lets the explorer's page load nothing from other servers.
JUPYTER_DEFAULTS = Path(__file__).parent
_RECORD = ".originals.json"  # name of each copy -> SHA-256 of its original


def refresh(originals: Path = ROOT / "notebooks", workspace: Path = WORKSPACE) -> list[str]:
    """Update the copies. Return one message per copy that was updated or kept.

    Raises ValueError if there are no originals, as in an installed cpkit, and if a copy cannot be
    written.
    """
    found = sorted(originals.glob("*.ipynb"))
    if not found:
        raise ValueError(
            f"the notebooks are in cpkit's repository and not in this installed package (there are "
            f"none in {originals}): clone the repository, and run `make lab` there"
        )
    try:
        return _update(found, workspace)
    except OSError as error:
        raise ValueError(
            f"cannot write your copies of the notebooks to {workspace}: {describe(error)}; make "
            f"this directory writable, or clone cpkit to a directory that you can write to"
        ) from error


def _update(originals: list[Path], workspace: Path) -> list[str]:
    workspace.mkdir(exist_ok=True)
    record = _read_record(workspace / _RECORD)
    messages = [_refresh_one(path, workspace, record.get(path.name)) for path in originals]
    made_from = {path.name: _digest(path) for path in originals}
    (workspace / _RECORD).write_text(json.dumps(made_from, indent=1) + "\n")
    return list(filter(None, messages))


def _refresh_one(original: Path, workspace: Path, made_from: str | None) -> str:
    """Update one copy. `made_from` is the digest of the original it was copied from, if known."""
    copy, current = workspace / original.name, _digest(original)
    shown = f"{workspace.name}/{copy.name}"
    if not copy.exists():
        shutil.copyfile(original, copy)
        return ""
    if current in (made_from, _digest(copy)):
        return ""
    if made_from == _digest(copy):
        shutil.copyfile(original, copy)
        return f"{shown} was updated: you had not modified it, and its original has changed."
    beside = _free_name(copy)
    shutil.copyfile(original, beside)
    return (
        f"{shown} was kept, because you have modified it. Its original has changed: "
        f"the new version is {workspace.name}/{beside.name}."
    )


def _free_name(copy: Path) -> Path:
    """Return NAME.new.ipynb, or NAME.new2.ipynb and so on if that exists."""
    beside, number = copy.with_suffix(".new.ipynb"), 2
    while beside.exists():
        beside, number = copy.with_suffix(f".new{number}.ipynb"), number + 1
    return beside


def _read_record(path: Path) -> dict[str, str]:
    """Return the record. It is empty if missing or damaged, so every differing copy is kept."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
