"""`python -m cpkit explore` (`make explore`): the explorer alone on a page, in a real Chromium."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from cpkit.notebook.show import find_browser
from tests.helpers import ROOT
from tests.helpers.notebook_page import CHROMIUM_FLAGS
from tests.helpers.processes import left_after, processes_with, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("voila", reason="Voilà is not installed: pip install voila")
BROWSER = find_browser()

pytestmark = [
    pytest.mark.workers,
    pytest.mark.notebook,
    pytest.mark.browser,
    pytest.mark.slow("starts workers, a server and a browser for one page"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome: apt-get install chromium"),
]


def test_the_page_is_live_local_guarded_by_a_token_and_leaves_nothing(tmp_path: Path) -> None:
    names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    private = {name: str(tmp_path / name) for name in names}
    command = [sys.executable, "-m", "cpkit", "explore", "--name=page", "--nproc=2", "--no-browser"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **private}, stdout=file, stderr=file
        )
    try:
        address = r"http://127\.0\.0\.1:\d+/\?token=\w+"
        until(lambda: re.search(address, log.read_text()) or server.poll(), 60, log.read_text)
        url = re.findall(address, log.read_text())[0]
        check_page(url)
        port = urlsplit(url).port
        children = psutil.Process(server.pid).children(recursive=True)
        open_ = [each for child in children for each in child.net_connections("tcp")]
        listening = [each.laddr for each in open_ if each.status == psutil.CONN_LISTEN]
        assert [ip for ip, number in listening if number == port] == ["127.0.0.1"]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, log.read_text()
    assert not left_after(10, lambda: list(processes_with(names[0], private[names[0]]).values()))


def check_page(url: str) -> None:
    """Check that the page shows the live panel, and loads nothing from other servers."""
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=BROWSER, args=CHROMIUM_FLAGS)
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        failed: dict[str, str] = {}
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.on("requestfailed", lambda request: failed.update({request.url: request.failure}))
        page.goto(url.partition("?")[0])
        assert "/login" in page.url
        page.goto(url)
        page.wait_for_selector(".js-plotly-plot[data-revision]", state="attached")
        page.wait_for_function("document.querySelectorAll('.cpkit-path').length === 4")
        assert page.locator(".cm-content, .jp-InputArea").count() == 0, "the output alone"
        own = urlsplit(url).netloc
        others = [each for each in requested if urlsplit(each).netloc not in (own, "")]
        assert all(failed[each] == "csp" for each in others), "the browser refuses to load them"
        chromium.close()
