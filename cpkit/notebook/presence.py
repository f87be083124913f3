"""Whether a page shows a panel, and how long ago it was touched: how often to measure.

    touched in the last two minutes   every `interval_s`
    not touched                       every second
    every page that showed it is hidden or closed   not at all

Without any page (a script, a notebook that is executed without a browser) a panel counts as shown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

IDLE_INTERVAL_S = 1.0


class Presence:
    """What the pages report about one panel. Thread-safe."""

    def __init__(self, interval_s: float, idle_after_s: float) -> None:
        self._interval_s, self._idle_after_s = interval_s, idle_after_s
        self._touched_s = time.monotonic()
        self._visible: dict[str, bool] = {}  # by view
        self._waiting = 0  # cells that wait for a sample
        self._changed = threading.Condition()

    def report(self, content: Mapping[str, object]) -> None:
        """Take a view's message: `{"view": id, "visible": bool}`, with `"touched"` if it was."""
        view, visible = content.get("view"), content.get("visible")
        if isinstance(view, str) and isinstance(visible, bool):
            with self._changed:
                self._visible[view] = visible
                self._changed.notify_all()
        if content.get("touched"):
            self.touch()

    def touch(self) -> None:
        """Note that the panel is used now."""
        with self._changed:
            self._touched_s = time.monotonic()
            self._changed.notify_all()

    @property
    def is_hidden(self) -> bool:
        """True if pages have shown the panel, none of them does now, and no cell waits for it."""
        with self._changed:
            is_shown = self._waiting or any(self._visible.values())
            return bool(self._visible) and not is_shown

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Measure as if a page showed the panel, while a cell waits for a sample."""
        self._count_waiting(1)
        try:
            yield
        finally:
            self._count_waiting(-1)

    def _count_waiting(self, change: int) -> None:
        with self._changed:
            self._waiting += change
            self._changed.notify_all()

    @property
    def is_idle(self) -> bool:
        """True if the panel was not touched for `idle_after_s`."""
        return time.monotonic() - self._touched_s >= self._idle_after_s

    def interval_s(self) -> float:
        """Return the time between two samples of a shown panel."""
        return max(self._interval_s, IDLE_INTERVAL_S) if self.is_idle else self._interval_s

    def wait(self, timeout_s: float) -> None:
        """Wait until something is reported, or for `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)
