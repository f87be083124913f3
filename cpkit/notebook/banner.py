"""The banner of a panel whose workers have ended or hang: what happened, and a button to restart.

It is empty, and takes no room, while the workers are well.
"""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as widgets

from cpkit.control.errors import RankHangs, WorkersDied
from cpkit.control.exit_report import describe_exit
from cpkit.notebook import style
from cpkit.notebook.live import close_widgets

_LONGEST_LINE = 200  # characters of a log line
_LOOK = f"border-left: 6px solid {style.WRONG}; padding: 2px 10px"


class WorkersBanner(widgets.VBox):  # type: ignore[misc]
    """Shows the error of the workers. *Restart* calls `restart`."""

    def __init__(self, restart: Callable[[], None]) -> None:
        self._text = widgets.HTML()
        self._button = widgets.Button(
            description="Restart",
            icon="refresh",
            tooltip="start new workers and go on measuring",
        )
        self._button.add_class("restart").on_click(lambda _: restart())
        super().__init__(_dom_classes=("cpkit-banner",))

    def show(self, error: Exception) -> None:
        """Show why the workers cannot be used, with the last lines of the rank's log."""
        self._text.value = _alert(_what_happened(error))
        self._button.disabled = False
        self._place(self._text, self._button)

    def show_starting(self, workers: int) -> None:
        """Show that new workers are being started."""
        self._text.value = _alert(f"starting {workers} workers …")
        self._button.disabled = True
        self._place(self._text, self._button)

    def hide(self) -> None:
        """Show nothing."""
        self._place()

    def _place(self, *parts: widgets.Widget) -> None:
        self.children = parts

    def close(self) -> None:
        """Close the parts too, also those that are not shown."""
        close_widgets(self._text)
        close_widgets(self._button)
        super().close()


def _alert(content: str) -> str:
    return f'<div role="alert" style="{_LOOK}">{content}</div>'


def _what_happened(error: Exception) -> str:
    text = html.escape(str(error))
    if isinstance(error, RankHangs):
        return f"✗ <b>A rank does not respond.</b> {text}. This panel goes on when it does."
    if not isinstance(error, WorkersDied) or error.rank is None:
        return f"✗ <b>The workers cannot be reached.</b> {text}"
    log = "\n".join(f"{line:.{_LONGEST_LINE}}" for line in error.log_lines) or "(empty)"
    return (
        f"✗ <b>Rank {error.rank} has ended, with {describe_exit(error.exit_code)}.</b> The other "
        f"ranks were stopped too. The last lines of its log:"
        f'<pre style="margin: 0; max-height: 12em; overflow: auto">{html.escape(log)}</pre>'
    )
