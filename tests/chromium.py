"""Drives a headless Chromium: opens a page, presses keys, and asks it questions.

The browser speaks the DevTools protocol over two pipes, file descriptors 3 and 4, as
JSON messages that end in a zero byte. There is no network: every request is listed.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 60  # seconds for any one answer, on a busy machine
# The pipes come as standard input and output: those can be handed over without a fork.
LAUNCH = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
FLAGS = (
    "--headless --no-sandbox --remote-debugging-pipe --disable-gpu --no-first-run "
    "--disable-background-networking --disable-extensions --disable-dev-shm-usage"
).split()


class Chromium:
    """A browser with one tab; `with Chromium(folder) as tab:` ends it in any case."""

    def __init__(self, profile: Path):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._profile, self._last, self._unread = profile, 0, b""

    def __enter__(self):
        assert PROGRAM
        self._process = subprocess.Popen(
            ["sh", "-c", LAUNCH, PROGRAM, *FLAGS, f"--user-data-dir={self._profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._session = None
            tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
            to_tab = self.ask("Target.attachToTarget", targetId=tab, flatten=True)
            self._session = to_tab["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
            offline = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            self.ask("Network.emulateNetworkConditions", offline=True, **offline)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)  # with its child processes
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()

    def ask(self, method: str, **params):
        """Sends one command and waits for its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, deadline: float):
        while b"\0" not in self._unread:
            pipe, left = self._process.stdout.fileno(), deadline - time.monotonic()
            ready, _, _ = select.select([pipe], [], [], max(left, 0))
            data = os.read(pipe, 1 << 20) if ready else b""
            assert data, "the browser has ended, or does not answer"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            if not params["request"]["url"].startswith("data:"):  # in the page itself
                self.requests.append(params["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(params))
        return message

    def run(self, code: str):
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.ask(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, (code, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, code: str):
        """Waits until an expression is true, and gives its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.run(code)):
            assert time.monotonic() < deadline, f"never true: {code}"
            time.sleep(0.02)
        return value

    def open(self, path: Path, fragment: str = ""):
        """Loads a page from disk anew, and waits until its script is done."""
        self.ask("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.requests.clear()
        self.ask("Page.navigate", url=path.as_uri() + fragment)
        self.wait(
            "document.readyState === 'complete' "
            " && document.body.dataset.ready === 'yes'"
        )

    def press(self, key: str, text: str = ""):
        """One key, down and up, where the focus is; `text` is what it writes."""
        text = text or {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowUp": 38, "ArrowDown": 40}
        code = codes.get(key, ord(key) if len(key) == 1 else 0)
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, path: Path):
        """A screenshot of what is in view."""
        data = self.ask("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))
