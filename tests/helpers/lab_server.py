"""A JupyterLab for a test: private directories, random token, an empty notebook directory."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.processes import left_after, processes_with

SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}


class JupyterLab:
    """A separate server. Its kernels connect to the workers of `runtime_dir`, if given."""

    def __init__(self, home: Path, runtime_dir: Path | None = None, name: str = "default") -> None:
        self.home, self.token, self.port = home, secrets.token_hex(16), _free_port()
        self._shared = {"CPKIT_NAME": name}
        self._shared["JUPYTER_RUNTIME_DIR"] = str(runtime_dir or home / "runtime")
        self.notebooks = home / "notebooks"
        self.notebooks.mkdir()
        for name, values in SETTINGS.items():
            file = home / "settings" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        self.log = (home / "lab.log").open("w+")
        self.process = subprocess.Popen(
            self._command(), env=os.environ | self._environment(), stdout=self.log, stderr=self.log
        )

    def _command(self) -> list[str]:
        options = {
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": self.notebooks,
            "IdentityProvider.token": self.token,
            "LabApp.expose_app_in_browser": True,  # for commands without a menu item
        }
        flags = ["--no-browser", "--ip=127.0.0.1", "--allow-root"]
        flags += [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "jupyterlab", *flags]

    def _environment(self) -> dict[str, str]:
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
        private = {name: str(self.home / name.lower()) for name in names} | self._shared
        private["JUPYTERLAB_SETTINGS_DIR"] = str(self.home / "settings")
        private["JUPYTERLAB_WORKSPACES_DIR"] = str(self.home / "workspaces")
        return private

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}"

    def wait(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.text()
            try:
                with urllib.request.urlopen(self.url("api/status"), timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        pytest.fail(f"JupyterLab did not start in {timeout_s} s:\n{self.text()}")

    def end_kernels(self) -> None:
        """Shut all kernels down."""
        with urllib.request.urlopen(self.url("api/kernels"), timeout=20) as answer:
            kernels = json.load(answer)
        for kernel in kernels:
            url = self.url(f"api/kernels/{kernel['id']}")
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=20).close()

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def left_behind(self, timeout_s: float = 10.0) -> list[str]:
        """Return the processes with our config directory in their environment after the timeout."""
        ours = "JUPYTER_CONFIG_DIR", self._environment()["JUPYTER_CONFIG_DIR"]
        return left_after(timeout_s, lambda: list(processes_with(*ours).values()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
