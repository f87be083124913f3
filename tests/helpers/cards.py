"""Read the cards that a lesson displays: predictions, reveals and checks."""

from __future__ import annotations

from unittest import mock

from cpkit_lessons import feedback


def shown(call, *arguments: object) -> str:
    """Return the text that a call displayed."""
    with mock.patch.object(feedback, "display") as display:
        call(*arguments)
    ((data,), options) = display.call_args
    assert display.call_count == 1
    assert options == {"raw": True}
    assert data["text/html"].startswith(("<div", "<p>"))
    return data["text/plain"]
