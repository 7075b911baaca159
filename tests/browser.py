"""A browser for tests: headless Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2) with urllib."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "home": "\ue011", "end": "\ue010"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Browser:
    """One window. Elements are named by CSS selectors; the first that fits is meant."""

    def __init__(self, port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{port}/session"
        chrome = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": chrome, "goog:loggingPrefs": logs}}
        self._root += f"/{_send(self._root, {'capabilities': wanted})['sessionId']}"
        self.open("about:blank")  # and not its own start page, which asks for much
        self.log("performance")

    def open(self, address: str) -> None:
        self._do("url", url=address)

    def js(self, code: str, *arguments: object) -> Any:
        """What the body of a function `code` returns; its arguments are `arguments`."""
        return self._do("execute/sync", script=code, args=list(arguments))

    def resize(self, width: int, height: int, touch: bool = False) -> None:
        """The page's own size in CSS pixels; as a phone's, if `touch`."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=touch)

    def cdp(self, command: str, **parameters: object) -> Any:
        return self._do("goog/cdp/execute", cmd=command, params=parameters)

    def press(self, selector: str, *keys: str) -> None:
        """Focus an element as the tab key does, and press keys by their names in `KEYS`."""
        self.js("document.querySelector(arguments[0]).focus()", selector)
        presses = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self._do("actions", actions=[{"type": "key", "id": "keyboard", "actions": presses}])

    def click(self, selector: str) -> None:
        self._point(selector, "mouse", 0, 0)

    def drag(self, selector: str, right: float, down: float, kind: str = "touch") -> None:
        """From the middle of an element by so many of its widths and heights, with "touch" or "mouse"."""
        self._point(selector, kind, right, down)

    def _point(self, selector: str, kind: str, right: float, down: float) -> None:
        box = self.js(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", selector,
        )  # fmt: skip
        x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
        steps: list[dict[str, object]] = [_move(x, y, 0), {"type": "pointerDown", "button": 0}]
        if right or down:
            steps += [_move(x + right * box[2] * part / 8, y + down * box[3] * part / 8, 20) for part in range(1, 9)]
        steps.append({"type": "pointerUp", "button": 0})
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": steps}
        self._do("actions", actions=[pointer])

    def picture(self, path: Path, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def pixels(self, selector: str) -> bytes:
        """A PNG of what an element shows."""
        box = self.js(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height, scale: 1}", selector,
        )  # fmt: skip
        shot = self.cdp("Page.captureScreenshot", clip=box, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: "browser" (the console) or "performance" (the network)."""
        return list(self._do("se/log", type=kind))

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        _send(self._root, None, "DELETE")

    def _do(self, command: str, **body: object) -> Any:
        return _send(f"{self._root}/{command}", body)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A fresh Chromium with an empty profile; ended with its driver."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        window = Browser(port, profile)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(20)


def _move(x: float, y: float, milliseconds: int) -> dict[str, object]:
    return {"type": "pointerMove", "x": round(x), "y": round(y), "duration": milliseconds, "origin": "viewport"}


def _send(address: str, body: object, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is here, whatever proxy there is
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        told = json.load(error)["value"]
        raise AssertionError(f"{told['error']}: {told['message']}") from None
