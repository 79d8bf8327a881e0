# SPDX-License-Identifier: BSD-3-Clause
"""The page at ``/`` in a real browser, driven over the DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.serve.conftest import Running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0"
).split()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; Debian's package will do")]


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._ids = socket, itertools.count(1)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer: dict[str, Any] = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 120) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"not so after {seconds} s: {script}"
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """Write a screenshot, PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@pytest.fixture
def page(tmp_path: Path, served: Running) -> Iterator[Page]:
    """The server's page, loaded."""
    with subprocess.Popen(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path}/browser", "about:blank"], stderr=subprocess.DEVNULL
    ) as browser:
        try:
            ready = tmp_path / "browser" / "DevToolsActivePort"
            end = time.monotonic() + 60
            while not (ready.is_file() and ready.read_text().count("\n")):
                assert time.monotonic() < end, "the browser did not start"
                time.sleep(0.1)
            port = ready.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as tabs:
                address = next(t["webSocketDebuggerUrl"] for t in json.load(tabs) if t["type"] == "page")
            with connect(address, max_size=None) as socket:
                tab = Page(socket)
                tab.send("Page.navigate", url=served.url)
                tab.wait("document.querySelectorAll('#adapters tr').length > 2")
                yield tab
        finally:
            browser.terminate()


def test_conversation_with_two_adapters_side_by_side(page: Page, served: Running, tmp_path: Path):
    """Two adapters answer two turns in columns of their own, with the words that the API gives each; the verdicts show."""
    for name in ("one", "two"):
        page.run(f"document.getElementById('use-{name}').click()")
    page.run("document.getElementById('tokens').value = 12")
    said: list[str] = ["Hello", "And then?"]
    for turn, words in enumerate(said, 1):
        page.run(
            f"document.getElementById('prompt').value = {json.dumps(words)}; document.getElementById('ask').requestSubmit()"
        )
        page.wait(
            f"document.querySelectorAll('.turn').length == {4 * turn} && !document.getElementById('send').disabled"
        )
    client = served.client()
    for name in ("one", "two"):
        shown = page.run(f"[...document.querySelectorAll('[data-model={name}] .turn')].map(t => t.textContent)")
        messages: list[Any] = []
        for words, answer in zip(said, shown[1::2], strict=True):
            messages.append({"role": "user", "content": words})
            made = client.chat.completions.create(model=name, messages=messages, max_tokens=12, temperature=0)
            assert answer == made.choices[0].message.content
            messages.append({"role": "assistant", "content": answer})
        assert shown[0::2] == said
    page.wait(
        "[...document.querySelectorAll('#adapters tr')].filter(r => r.textContent.includes('passed')).length >= 2"
    )
    pictures = Path(os.environ.get("QEFF_PICTURES", tmp_path))
    for name, width, scheme in (("desktop", 1280, "light"), ("phone", 390, "dark")):
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), f"{name}: wider than the window"
        page.picture(pictures / f"page-{name}.png")


def test_page_says_what_is_wrong(page: Page):
    """Nothing chosen is said in words, and the page goes on."""
    page.run("document.getElementById('prompt').value = 'x'; document.getElementById('ask').requestSubmit()")
    page.wait("document.getElementById('trouble').textContent == 'Choose at least one adapter.'", 10)
