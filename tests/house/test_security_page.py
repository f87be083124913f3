"""Each threat that docs/security.md lists has a test, and the test exists."""

from __future__ import annotations

import re

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = re.findall(
    r"^\| (?!threat|---).* \|.* \| (.*) \|$", PAGE.split("## Before")[1], re.MULTILINE
)


def test_each_threat_has_a_test_that_exists() -> None:
    assert len(ROWS) > 20
    for row in ROWS:
        test = re.fullmatch(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert test, f"{row!r} must name a test"
        assert f"\ndef {test[2]}(" in (ROOT / test[1]).read_text(), f"{row} does not exist"
