"""Drives a headless Chromium by the WebDriver protocol, as far as tests of one page need it."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

KEYS = {"ESCAPE": "\ue00c", "ARROW_LEFT": "\ue012", "ARROW_RIGHT": "\ue014", "ARROW_DOWN": "\ue015"}
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,1000"),
)


class Browser:
    """One window; to be used in a ``with`` statement.

    Args:
        profile: An empty folder.
        dark: Asks pages for their dark theme.
    """

    def __init__(self, profile: Path, dark: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.options = [*OPTIONS, f"--user-data-dir={profile}"]
        if dark:
            self.options.append("--blink-settings=preferredColorScheme=0")

    def __enter__(self) -> Browser:
        port = self.address.rpartition(":")[2]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.address}/status", timeout=5)
                break
            time.sleep(0.1)
        wanted = {"goog:chromeOptions": {"args": self.options}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/session/{session['sessionId']}"
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(timeout=30)

    def open(self, address: str) -> None:
        """Loads a page afresh, also where only the part after # differs."""
        self._ask("POST", "/url", {"url": "about:blank"})
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: object) -> Any:
        """Runs the body of a JavaScript function in the page; promises are waited for."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def press(self, *keys: str) -> None:
        """Presses keys one after the other: characters, or names in ``KEYS``."""
        values = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": value} for value in values for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def resize(self, width: int, height: int) -> None:
        """Gives the page another size, also a smaller one than a window can have."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def problems(self) -> list[str]:
        """Returns errors and warnings on the page's console since the last call."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        """Saves a picture of the window."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, content, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]
