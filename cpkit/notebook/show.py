"""Show a figure in every reader: with JavaScript, without it, and as text for screen readers.

The output contains plotly's own format and a text alternative. With CPKIT_STATIC=1 it also contains
a PNG, for readers such as GitHub that do not run JavaScript. A PNG requires Chromium or Chrome. If
there is none, the figure is shown without a PNG, and no cell fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from IPython.display import display

from cpkit.notebook.style import CONFIG, text_alternative
from cpkit.settings import figures_are_static

if TYPE_CHECKING:
    import plotly.graph_objects as go

PLOTLY_MIME = "application/vnd.plotly.v1+json"
NO_BROWSER = (
    "no Chromium or Chrome was found: install one (Debian and Ubuntu: apt-get install chromium), "
    "or set BROWSER_PATH to its path"
)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def show(figure: go.Figure) -> None:
    """Display a figure in the running cell: plotly, a PNG if CPKIT_STATIC=1, and text."""
    display(bundle(figure), raw=True)  # type: ignore[no-untyped-call]


def bundle(figure: go.Figure) -> dict[str, Any]:
    """Return the figure's content per MIME type. All but the PNG depend on the figure alone."""
    data: dict[str, Any] = {"text/plain": text_alternative(figure)}
    data[PLOTLY_MIME] = json.loads(figure.to_json()) | {"config": CONFIG}
    if figures_are_static():
        with contextlib.suppress(NoPicture):
            data["image/png"] = b64encode(png(figure)).decode()
    return data


class NoPicture(RuntimeError):
    """A figure cannot be drawn as a PNG here. The message gives the reason in one line."""


def png(figure: go.Figure, scale: float = 1.0) -> bytes:
    """Return the figure as PNG bytes. Raises NoPicture."""
    return _with_palette(_draw(figure, "png", scale))


def svg(figure: go.Figure) -> bytes:
    """Return the figure as SVG bytes. Raises NoPicture."""
    return _draw(figure, "svg", 1.0)


def _draw(figure: go.Figure, kind: str, scale: float) -> bytes:
    browser = find_browser()
    if browser is None:
        named = os.environ.get("BROWSER_PATH")
        wrong = f"BROWSER_PATH is {named!r}, which is not an executable: correct it or unset it"
        raise NoPicture(wrong if named else NO_BROWSER)
    try:
        import kaleido  # a live figure does not need it

        # Use one browser per picture: kaleido's shared server waits forever if its browser dies.
        picture: bytes = kaleido.calc_fig_sync(
            figure,
            opts={"format": kind, "scale": scale},
            kopts={"path": browser, "mathjax": False, "timeout": 30},
        )
        return picture
    except Exception as problem:  # kaleido raises many kinds
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise NoPicture(f"{browser} did not draw the figure: {reason}") from problem


def _with_palette(picture: bytes) -> bytes:
    """Return the PNG in 256 colours: a third of the bytes, with the same flat colours and text."""
    from PIL import Image

    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def find_browser() -> str | None:
    """Return the path of an installed Chromium or Chrome. BROWSER_PATH has priority."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if os.access(named, os.X_OK) else None
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)
