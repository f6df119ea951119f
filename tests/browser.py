"""A headless Chromium, driven through its pipe of JSON messages: what it asks the network for is kept."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from select import select

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
]
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


class Tab:
    """One open page.

    Attributes:
        requests: addresses that were asked for, the page's own first.
        problems: what the page's script, or the content security policy, complained of.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing, self._left, self._number = incoming, outgoing, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters):
        """Send a command, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._outgoing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self, timeout: float = 60.0):
        deadline = time.monotonic() + timeout
        while b"\0" not in self._left:
            assert select([self._incoming], [], [], max(0, deadline - time.monotonic()))[0], "the browser is silent"
            data = os.read(self._incoming, 2**16)
            assert data, "the browser is gone"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        event = json.loads(message)
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.problems.append(json.dumps(event["params"]))
        return event

    def open(self, page: Path, width: int = 1440, height: int = 900, *, dark: bool = False) -> None:
        """Load a page at a size in CSS pixels; under 800 as a phone does."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        """Return what an expression is in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            code = KEYS.get(key) or ord(key.upper())
            for kind in ("keyDown", "keyUp"):
                self.send(
                    "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                    **({"text": text} if text and kind == "keyDown" else {}),
                )  # fmt: skip

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a picture of the page, all of it or what is in the window."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def browser(profile: Path):
    """Start the browser, give an open tab, and end all of its processes."""
    to_read, to_write = os.pipe(), os.pipe()
    command = [str(PROGRAM), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    shell = ["bash", "-c", f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]} 2>/dev/null', "bash", *command]
    process = subprocess.Popen(shell, pass_fds=(to_read[0], to_write[1]), start_new_session=True, cwd="/")
    try:
        for end in (to_read[0], to_write[1]):
            os.close(end)
        yield Tab(to_write[0], to_read[1])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        for end in (to_read[1], to_write[0]):
            os.close(end)
