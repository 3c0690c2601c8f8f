"""A headless Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2/).

The few commands that the tests of the page need, over plain HTTP to ``chromedriver``.
Everything that waits is bounded, and ends as soon as what is waited for is so.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Longer than anything takes; a test that has waited so long has failed.
PATIENCE = 20.0
LOOK_SECONDS = 0.03

# Names of keys, section 17.4.2.
ESCAPE = "\ue00c"
TAB = "\ue004"
ENTER = "\ue007"

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # section 12.1 of the standard
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-proxy-server",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
_PORT = re.compile(rb"started successfully on port (\d+)")


class Unfound(Exception):
    """Nothing in the page is what was asked for."""


def programs() -> tuple[str, str] | None:
    """The browser and its driver; None where one of them is missing."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))),
        None,
    )
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window."""

    def __init__(self, driver: str, session: str) -> None:
        self._base = f"{driver}/session/{session}"

    # --- going about ---------------------------------------------------------------

    def open(self, url: str) -> None:
        self._call("POST", "url", {"url": url})

    def url(self) -> str:
        return str(self._call("GET", "url"))

    def resize(self, width: int, height: int) -> None:
        """The size of the page itself, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.devtools("Emulation.setDeviceMetricsOverride", size | {"mobile": False})

    def prefer(self, **features: str) -> None:
        """What the person prefers, such as ``color_scheme="dark"``."""
        wanted = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.devtools("Emulation.setEmulatedMedia", {"features": wanted})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        body = {"cmd": command, "params": parameters}
        return self._call("POST", "goog/cdp/execute", body)

    # --- looking -------------------------------------------------------------------

    def script(self, text: str, *arguments: Any) -> Any:
        """Run a function's body in the page, and return what it returns."""
        return self._call("POST", "execute/sync", {"script": text, "args": arguments})

    def text(self, selector: str = "main") -> str:
        """What can be read there now; "" if there is no such thing."""
        found = self.script(
            "return document.querySelector(arguments[0])?.innerText ?? ''", selector
        )
        return str(found)

    def count(self, selector: str) -> int:
        """How many of these can be seen."""
        found = self.script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter((one) => one.checkVisibility()).length",
            selector,
        )
        return int(found)

    def until(self, is_so: Callable[[], Any], what: str) -> Any:
        """Wait until something holds, and return it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(Unfound):
                if found := is_so():
                    return found
            time.sleep(LOOK_SECONDS)
        raise AssertionError(
            f"it never came true that {what}; the page says:\n{self.text('body')}\n"
            f"and its console: {self.complaints()}"
        )

    def sees(self, text: str, selector: str = "main") -> None:
        """Wait until a text can be read."""
        self.until(
            lambda: text.casefold() in self.text(selector).casefold(),
            f"{text!r} can be read in {selector}",
        )

    def complaints(self) -> list[str]:
        """What the console holds since it was last asked: errors, refused content."""
        found = self._call("POST", "se/log", {"type": "browser"})
        return [str(entry["message"]) for entry in found]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "screenshot")))

    # --- doing ---------------------------------------------------------------------

    def press(self, text: str, within: str = "body") -> None:
        """Click what can be seen and says or is called so."""
        self._act("click", self._named(text, within), {})

    def click(self, selector: str) -> None:
        self._act("click", lambda: self._found(selector), {})

    def type(self, selector: str, text: str) -> None:
        """Type into a field, in place of what is there."""
        self._act("clear", lambda: self._found(selector), {})
        self._act("value", lambda: self._found(selector), {"text": text})

    def attach(self, selector: str, path: Path) -> None:
        """Choose a file in a field for files."""
        self._act("value", lambda: self._found(selector), {"text": str(path)})

    def keys(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = [
            {"type": kind, "value": key}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self._call("POST", "actions", {"actions": [source]})

    def _act(self, what: str, target: Callable[[], str], body: dict[str, Any]) -> None:
        """Do something to an element; the page may be about to draw it anew."""

        def is_done() -> bool:
            try:
                self._call("POST", f"element/{target()}/{what}", body)
            except _Refused as refused:
                if refused.error not in _PASSING:
                    raise
                return False
            return True

        self.until(is_done, f"there is something to {what}")

    def _found(self, selector: str) -> str:
        element = self.script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".find((one) => one.checkVisibility() || one.type === 'file') ?? null",
            selector,
        )
        if element is None:
            raise Unfound(selector)
        return str(element[_ELEMENT])

    def _named(self, text: str, within: str) -> Callable[[], str]:
        def find() -> str:
            element = self.script(_BY_NAME, text, within)
            if element is None:
                raise Unfound(text)
            return str(element[_ELEMENT])

        return find

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _call(method, f"{self._base}/{path}", body)


_BY_NAME = """
const [text, within] = arguments;
const called = (one) =>
  [one.getAttribute('aria-label'), one.innerText].map((name) => name?.trim());
return [...document.querySelectorAll(within)]
  .flatMap((place) => [...place.querySelectorAll('button, a, summary, label')])
  .find((one) => one.checkVisibility() && called(one).includes(text)) ?? null;
"""

# Errors of a moment in which the page changes (section 6.6 of the standard).
_PASSING = {
    "stale element reference",
    "element not interactable",
    "element click intercepted",
    "invalid element state",
}


class _Refused(Exception):
    def __init__(self, error: str, message: str) -> None:
        super().__init__(f"{error}: {message}")
        self.error = error


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        value = json.load(error)["value"]
        raise _Refused(value["error"], value["message"]) from None


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a profile in ``folder``, until the end of the block.

    Raises:
        RuntimeError: there is none on this machine (see ``programs``).
    """
    found = programs()
    if found is None:
        raise RuntimeError("chromium or chromedriver is missing")
    browser, driver = found
    log = folder / "chromedriver.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [driver, "--port=0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(folder)},
        )
    try:
        url = f"http://127.0.0.1:{_port(log, process)}"
        options = {
            "binary": browser,
            "args": [*_OPTIONS, f"--user-data-dir={folder / 'profile'}"],
            "prefs": {"download.default_directory": str(folder)},
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        asked = {"capabilities": {"alwaysMatch": wanted}}
        session = _call("POST", f"{url}/session", asked)["sessionId"]
        try:
            yield Browser(url, session)
        finally:
            _call("DELETE", f"{url}/session/{session}")
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _port(log: Path, process: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if said := _PORT.search(log.read_bytes()):
            return int(said[1])
        time.sleep(LOOK_SECONDS)
    raise RuntimeError(f"chromedriver did not start:\n{log.read_text()}")
