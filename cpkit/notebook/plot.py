"""A live plot: every view shows the figure that the kernel published most recently.

    kernel                          page
    PlotState.figure   ──state──▶   plot.js ──▶ Plotly.react
    PlotlyLibrary.gzip ──state──▶      │  once per page
    LivePlot           ──view───▶   one element per view

The figure is the state of a widget, so a second view, or a view after a reload of the page, shows
the same figure as the first one. Figure and library are plain widgets, because messages to an
`AnyWidget` can be lost: if its front-end module is evaluated more than two seconds after the model
was created, anywidget drops all further messages to that model. `LivePlot` itself sends no
messages. Each view reports through `PlotState` when its page is hidden, shown or closed, and when
the panel around it is touched.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import msgspec
import traitlets

from cpkit.notebook import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

UPDATE_INTERVAL_S = 0.08  # 5 to 10 figures per second look continuous
MAX_WIDTH_PX = 860


class PlotlyLibrary(widgets.Widget):  # type: ignore[misc]
    """The plotly.js of the installed plotly, compressed. All plots of a kernel share one."""

    version = traitlets.Unicode(version("plotly")).tag(sync=True)
    gzip = traitlets.Bytes().tag(sync=True)


class PlotState(widgets.Widget):  # type: ignore[misc]
    """The published figure as JSON, with its revision number."""

    figure = traitlets.Unicode().tag(sync=True)


class LivePlot(anywidget.AnyWidget):
    """A plot in the page; `publish` replaces its figure in every view."""

    _esm = Path(__file__).with_name("plot.js")
    plotly_library = traitlets.Instance(PlotlyLibrary).tag(
        sync=True, **widgets.widget_serialization
    )
    plot_state = traitlets.Instance(PlotState).tag(sync=True, **widgets.widget_serialization)

    def __init__(self, figure: go.Figure | style.PlainFigure) -> None:
        self.revision = self._handed_out = 0
        self._published_at_s = 0.0
        super().__init__(
            plotly_library=_library(),
            plot_state=PlotState(figure=self._next_revision(figure)),
            layout={"width": "100%", "max_width": f"{MAX_WIDTH_PX}px"},
        )

    def publish(
        self, figure: go.Figure | style.PlainFigure, *, replaced_soon: bool = False
    ) -> None:
        """Replace the figure in every view. The zoom is kept while `uirevision` is unchanged.

        A figure that is `replaced_soon` is drawn only if no other one follows soon.
        """
        self.plot_state.figure = self._next_revision(figure, replaced_soon=replaced_soon)

    def on_report(self, report: Callable[[dict[str, Any]], None]) -> None:
        """Call `report` with each message of a view; see `cpkit.notebook.presence`."""
        self.plot_state.on_msg(lambda _, content, __: report(content))

    def hand_out(self, text: str, name: str = "") -> None:
        """Store a text in a file of the browser's user, or without a name in the clipboard.

        One view does so: the first one in the page that has the focus.
        """
        self._send_once({"name": name, "text": text})

    def hand_out_picture(self, name: str) -> None:
        """Store the figure in a file of the browser's user; its name ends in .png or .svg."""
        self._send_once({"name": name})

    def _send_once(self, what: dict[str, str]) -> None:
        self._handed_out += 1
        self.plot_state.send({"take": what | {"number": self._handed_out}})

    def is_due(self) -> bool:
        """Return True if `UPDATE_INTERVAL_S` has passed since the last figure was published."""
        return time.monotonic() - self._published_at_s >= UPDATE_INTERVAL_S

    def close(self) -> None:
        """Remove the plot from every page."""
        if getattr(self, "plot_state", None) is not None:
            self.plot_state.close()
        super().close()

    def _next_revision(
        self, figure: go.Figure | style.PlainFigure, *, replaced_soon: bool = False
    ) -> str:
        self.revision += 1
        self._published_at_s = time.monotonic()
        plain = figure if isinstance(figure, dict) else style.plain(figure)
        # Without `meta`, because plotly.js lays out all plots again when it changes.
        layout = {name: value for name, value in plain["layout"].items() if name != "meta"}
        content = {
            "data": plain["data"],
            "layout": {"uirevision": "live", **layout},
            "config": style.CONFIG,
            "revision": self.revision,
            "alt": style.text_alternative(plain),
            "replaced_soon": replaced_soon,
        }
        return msgspec.json.encode(content).decode()


def _library() -> PlotlyLibrary:
    """Return the kernel's library widget; a new one if `Widget.close_all()` has closed it."""
    library = _open_library()
    if library.comm is None:
        _open_library.cache_clear()
        library = _open_library()
    return library


@cache
def _open_library() -> PlotlyLibrary:
    plotly = find_spec("plotly")  # not imported, which would take a while
    assert plotly
    assert plotly.origin
    script = Path(plotly.origin).parent / "package_data" / "plotly.min.js"
    return PlotlyLibrary(gzip=gzip.compress(script.read_bytes(), compresslevel=1))
