"""Environment variables: one module reads them, and doctor and the documentation list them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest

from cpkit import settings
from cpkit.control.launch_options import Launch
from cpkit.control.launcher import start
from cpkit.doctor import report
from tests.helpers import ROOT
from tests.helpers.modules import MODULES

NAMES = {setting.name for setting in settings.SETTINGS}
INTERNAL = {settings.LAUNCH, settings.AGENT, settings.DEVICE, settings.GPU_NOTE}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("cpkit.")])
def test_only_settings_reads_the_variables(module: str) -> None:
    """Other modules may read `environ` by a literal name that is not cpkit's own."""
    if module in ("cpkit.settings", "cpkit.control.mps"):  # mps keeps NVIDIA's names in constants
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        name = _variable_read_by(node)
        assert name is None or not name.startswith(("CPKIT", "?")), (
            f"{module}:{node.lineno} reads {name}: use an accessor of cpkit.settings"
        )


def _variable_read_by(node: ast.AST) -> str | None:
    """Return the name that `environ[…]`, `.get(…)` or `getenv(…)` reads; "?…" if not a literal."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        owner, key = ast.unparse(node.value), node.slice
    elif isinstance(node, ast.Call) and node.args:
        function = ast.unparse(node.func)
        reads = (".environ.get", ".environ.pop", ".environ.setdefault", "os.getenv")
        if not function.endswith(reads):
            return None
        owner, key = "os.environ", node.args[0]
    else:
        return None
    if not owner.endswith("environ"):
        return None
    return key.value if isinstance(key, ast.Constant) else f"? {ast.unparse(key)}"


@pytest.mark.parametrize(
    "code",
    [
        'os.environ["CPKIT_NAME"]',
        'os.environ.get("CPKIT_NAME", "x")',
        "os.environ.get(variable)",
        'os.getenv("CPKIT_NAME")',
        'os.environ.pop("CPKIT_NAME")',
    ],
)
def test_every_way_to_read_is_found(code: str) -> None:
    node = ast.parse(code, mode="eval").body
    assert str(_variable_read_by(node)).startswith(("CPKIT", "?"))


def test_documentation_and_doctor_list_every_variable() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    shown = report()
    for setting in settings.SETTINGS:
        row = f"| `{setting.name}` | {setting.meaning} | {setting.default} |"
        assert row in page, row
        assert setting.name in shown
    assert set(re.findall(r"^\| `(CPKIT_\w+)`", page, re.MULTILINE)) == NAMES


def test_doctor_explains_a_value_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", "soon")
    assert "CPKIT_DEADLINE_S is 'soon'; it must be seconds" in report()


def test_every_variable_that_is_named_anywhere_is_declared() -> None:
    text = "".join(path.read_text() for path in MODULES.values())
    named = {name for name in re.findall(r"\bCPKIT_[A-Z_]+\b", text) if not name.endswith("_")}
    assert named == NAMES | INTERNAL


@pytest.mark.parametrize(
    ("name", "value", "read", "words"),
    [
        ("CPKIT_DEADLINE_S", "0", settings.deadline_s, "above 0"),
        *(
            ("CPKIT_DEADLINE_S", value, settings.deadline_s, "it must be seconds")
            for value in ("soon", "nan", "inf", "-1", "1e9")
        ),
        ("CPKIT_SYMM_PREALLOC_GB", "-1", settings.symm_prealloc_bytes, "be a number of GiB"),
        ("CPKIT_MEMORY_LIMIT_BYTES", "1 GiB", settings.memory_limit_bytes, "whole number of bytes"),
        ("CPKIT_MEMORY_LIMIT_BYTES", "0", settings.memory_limit_bytes, "1 or more"),
        ("CPKIT_SHM_DIR", "/proc", settings.check_shm_dir, "must be a writable directory"),
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
    with pytest.raises(ValueError, match=name):
        start(Launch(name="refused"))


@pytest.mark.parametrize(("value", "wait_s"), [("", 30), ("0.5", 0.5), ("86400", 86400)])
def test_a_valid_deadline_is_used(
    value: str, wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPKIT_DEADLINE_S", value)
    assert settings.deadline_s() == wait_s
