"""Show a figure so that it can be seen anywhere: live, without JavaScript, and read aloud.

A notebook page gets plotly's own format; a text alternative goes beside it. With CPKIT_STATIC=1 a
PNG is added, for readers such as GitHub that run no JavaScript. Drawing a PNG needs a Chromium;
where there is none, the figure is shown without it, and nothing fails.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from base64 import b64encode
from importlib import import_module
from typing import Any

import plotly.graph_objects as go
from IPython.display import display

from cpkit.notebook.style import text_alternative

PLOTLY_MIME = "application/vnd.plotly.v1+json"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def show(figure: go.Figure) -> None:
    """Display a figure in the running cell: plotly, a PNG when CPKIT_STATIC=1, and text."""
    display(bundle(figure), raw=True)  # type: ignore[no-untyped-call]


def bundle(figure: go.Figure) -> dict[str, Any]:
    """The figure as MIME type to content. All but the PNG follow from the figure alone."""
    data: dict[str, Any] = {"text/plain": text_alternative(figure)}
    data[PLOTLY_MIME] = json.loads(figure.to_json()) | {"config": {"displaylogo": False}}
    picture = png(figure) if os.environ.get("CPKIT_STATIC") == "1" else None
    if picture:
        data["image/png"] = b64encode(picture).decode()
    return data


def png(figure: go.Figure, scale: float = 1.0) -> bytes | None:
    """The figure as PNG bytes, or None (with a warning) where no Chromium can draw it."""
    browser = find_browser()
    if browser is None:
        return None
    try:
        kaleido = import_module("kaleido")  # only here: a live figure does not need it
        # A browser for each picture: kaleido's shared server waits for ever if its browser dies.
        picture: bytes = kaleido.calc_fig_sync(
            figure,
            opts={"format": "png", "scale": scale},
            kopts={"path": browser, "mathjax": False, "timeout": 30},
        )
    except Exception as problem:  # noqa: BLE001  a missing picture must not stop a lesson
        warnings.warn(f"no static picture: {problem}", stacklevel=2)
        return None
    return _with_palette(picture)


def _with_palette(picture: bytes) -> bytes:
    """The same PNG in 256 colours: a third of the bytes. Flat colours and text stay as they are."""
    image = import_module("PIL.Image")
    few = image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=image.Dither.NONE)
    small = io.BytesIO()
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome; BROWSER_PATH goes first."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if os.access(named, os.X_OK) else None
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)
