"""Environment variables: one module reads them, and doctor and the documentation list them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from cpkit import settings
from cpkit.doctor import report
from tests.helpers import ROOT
from tests.helpers.modules import MODULES

NAMES = {setting.name for setting in settings.SETTINGS}
INTERNAL = {settings.LAUNCH, settings.AGENT, settings.DEVICE, settings.GPU_NOTE}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "cpkit.settings"])
def test_only_settings_reads_the_variables(module: str) -> None:
    if not module.startswith("cpkit."):
        return
    read = re.findall(r"environ(?:\.get\(|\[)\s*\"(CPKIT_\w+)", MODULES[module].read_text())
    assert not read, f"{module} reads {read}: use an accessor of cpkit.settings"


def test_documentation_and_doctor_list_every_variable() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    shown = report()
    for setting in settings.SETTINGS:
        row = f"| `{setting.name}` | {setting.meaning} | {setting.default} |"
        assert row in page, row
        assert setting.name in shown
    assert set(re.findall(r"^\| `(CPKIT_\w+)`", page, re.MULTILINE)) == NAMES


def test_every_variable_that_is_named_anywhere_is_known() -> None:
    text = "".join(path.read_text() for path in MODULES.values())
    named = {name for name in re.findall(r"\bCPKIT_[A-Z_]+\b", text) if not name.endswith("_")}
    assert named == NAMES | INTERNAL


@pytest.mark.parametrize(
    ("name", "value", "read", "words"),
    [
        ("CPKIT_DEADLINE_S", "0", settings.deadline_s, "above 0"),
        ("CPKIT_DEADLINE_S", "soon", settings.deadline_s, "it must be seconds"),
        ("CPKIT_SYMM_PREALLOC_GB", "-1", settings.symm_prealloc_bytes, "it must be GiB"),
        ("CPKIT_MEMORY_LIMIT_BYTES", "1 GiB", settings.memory_limit_bytes, "whole number of bytes"),
        ("CPKIT_MEMORY_LIMIT_BYTES", "0", settings.memory_limit_bytes, "1 or more"),
        ("CPKIT_NCCL", "yes", settings.nccl_is_forced, "it must be 1"),
        ("CPKIT_STATIC", "true", settings.figures_are_static, "it must be 1"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(
    name: str,
    value: str,
    read: Callable[[], object],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}")) as raised:
        read()
    assert words in str(raised.value)
