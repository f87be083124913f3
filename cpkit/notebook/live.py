"""Live panels: controls, a status line and a live plot, and the thread that follows the controls.

control changed ──▶ submit(setting)   returns immediately
                        │  drops an older setting that waits, and stops work on one
                        ▼
                    work(setting, is_newest)   in one thread, one setting at a time
"""

from __future__ import annotations

import atexit
import html
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import ipywidgets as widgets

from cpkit.notebook import cells, style
from cpkit.notebook.plot import LivePlot

Setting = TypeVar("Setting")
IsNewest = Callable[[], bool]
_LONGEST_ERROR = 1000  # characters of an error that a panel shows


class LatestWins(Generic[Setting]):
    """Call `work(setting, is_newest)` for the newest setting, and `failed(error)` if it raises.

    Long work should call `is_newest()` periodically, and return if it is false.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Setting, IsNewest], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._work, self._failed = work, failed
        self._changed = threading.Condition()
        self._setting: Setting | None = None
        self._number = 0
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, setting: Setting) -> None:
        """Replace the setting to work on. Never blocks."""
        with self._changed:
            self._setting = setting
            self._number += 1
            self._changed.notify_all()

    def cancel(self) -> None:
        """Stop the work on a setting, until the next one is submitted. Never blocks."""
        with self._changed:
            self._setting = None
            self._number += 1
            self._changed.notify_all()

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop the work and end the thread. Return True if it ended in time."""
        with self._changed:
            self._closed = True
            self._number += 1
            self._changed.notify_all()
        atexit.unregister(self.close)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        seen = 0
        while True:
            with self._changed:
                while self._number == seen:
                    self._changed.wait()
                seen, setting = self._number, self._setting
            if self._closed:
                return
            if setting is None:
                continue
            is_newest = self._is_newest(seen)
            try:
                self._work(setting, is_newest)
            except Exception as error:  # noqa: BLE001  the panel shows it; the thread continues
                if is_newest():
                    self._failed(error)

    def _is_newest(self, number: int) -> IsNewest:
        return lambda: self._number == number


class LivePanel(Generic[Setting]):
    """Follow the latest setting of the controls. Display it as the last line of a cell.

    A subclass reads its controls in `_setting`, and works on the setting in `_work`. After an
    error, what the panel shows belongs to an earlier setting, and is greyed out until the next one.
    """

    description: ClassVar[str]  # shown where widgets cannot be displayed

    def __init__(self, controls: Sequence[Any], plot: LivePlot) -> None:
        cells.replace_previous(self)
        self.plot = plot
        self.plot.add_class(SHOWN)
        self._status = widgets.HTML(_dom_classes=("cpkit-status",))
        self._changed = threading.Condition()
        self._box = self._build(controls)
        self._worker = LatestWins(f"cpkit-{type(self).__name__.lower()}", self._work, self._fail)
        for control in controls:
            control.observe(self._submit, "value")
        self._submit()

    def close(self) -> None:
        """Stop the work, end the thread, and close the widgets."""
        self._worker.close()
        close_widgets(self._box)
        cells.forget(self)

    def _setting(self) -> Setting:
        """Return the setting of the controls. Raises ValueError for text that cannot be parsed."""
        raise NotImplementedError

    def _work(self, setting: Setting, is_newest: IsNewest) -> None:
        """Work on the setting, and return early if a newer one is submitted."""
        raise NotImplementedError

    def _build(self, controls: Sequence[Any]) -> widgets.Widget:
        """Return the widgets of the panel."""
        return live_box(widgets.HBox([controls_box(controls), self._status]), self.plot)

    def _submit(self, _: object = None) -> None:
        try:
            setting = self._setting()
        except ValueError as error:
            self._worker.cancel()
            self._fail(error)
        else:
            self._box.remove_class(STALE)
            self._worker.submit(setting)

    def _fail(self, error: Exception) -> None:
        self._box.add_class(STALE)
        text = html.escape(f"{type(error).__name__}: {error}"[:_LONGEST_ERROR])
        self._status.value = (
            f'<span style="color: {style.WRONG}; white-space: pre-wrap">✗ {text}</span>'
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        data: dict[str, Any] = self._box._repr_mimebundle_()
        return data | {"text/plain": self.description}


# When the kernel is lost, plot.js finds the parts by these classes and cpkit-status. It disables
# the controls and replaces the status line.


STALE, SHOWN, SPOKEN = "cpkit-stale", "cpkit-shown", "cpkit-spoken"
_STYLE = (
    f"<style>.{STALE} .{SHOWN} {{ opacity: 0.35 }} "
    f".{SPOKEN} {{ position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden; "
    f"clip-path: inset(50%) }} "
    # Buttons wrap to the next line instead of losing the end of their names.
    ".cpkit-controls { flex-wrap: wrap } "
    ".cpkit-controls > .jupyter-button { flex: none; width: auto }</style>"
)


def live_box(*children: widgets.Widget) -> widgets.VBox:
    """Return the parts of a live panel, one below the other.

    Parts with the class SHOWN are greyed out while the box has the class STALE. A part with the
    class SPOKEN is not visible: screen readers read its text when it changes.
    """
    return widgets.VBox((*children, widgets.HTML(_STYLE)), _dom_classes=("cpkit-live",))


def controls_box(controls: Sequence[widgets.Widget], **layout: str) -> widgets.HBox:
    """Return the controls, side by side."""
    return widgets.HBox(controls, layout=layout, _dom_classes=("cpkit-controls",))


def close_widgets(widget: widgets.Widget) -> None:
    """Close a widget, its children, and their layouts and styles."""
    for child in getattr(widget, "children", ()):
        close_widgets(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            part.close()
    widget.close()
