"""A real browser without a window, and the pages of reports in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

WAIT = """
const done = arguments[arguments.length - 1];
requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)));
"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a test does with the open page."""

    driver: Any

    def open(self, path: Path, at: str = "", *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Show a file as a visitor comes to it for the first time."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(f"{path.resolve().as_uri()}{at}")
        self.js("localStorage.clear()")
        self.settled()
        return self

    def js(self, code: str, *values: object) -> Any:
        """What a piece of script returns."""
        return self.driver.execute_script(code, *values)

    def settled(self) -> None:
        """Two frames later: whatever was asked for has been drawn."""
        self.driver.execute_async_script(WAIT)

    def click(self, selector: str) -> None:
        """Press the mouse on the first such element."""
        self.driver.find_element("css selector", selector).click()
        self.settled()

    def type(self, text: str, into: str = "") -> None:
        """Press keys, in an element or wherever the focus is."""
        target = self.driver.find_element("css selector", into) if into else self.driver.switch_to.active_element
        target.send_keys(text)
        self.settled()

    def text(self, selector: str) -> str:
        """What is to be read in the first such element."""
        found: str = self.driver.find_element("css selector", selector).text
        return found

    def rows(self) -> list[str]:
        """Names of the tensors that are drawn."""
        return list(self.js("return [...document.querySelectorAll('.row.tensor .name')].map((one) => one.title)"))

    def seen(self, selector: str) -> bool:
        """Whether such an element is on the page and shown."""
        return any(one.is_displayed() for one in self.driver.find_elements("css selector", selector))

    def complaints(self) -> list[str]:
        """What the browser wrote to its console: errors of scripts, and whatever the security policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own in `folder`; skips the test, with the reason, where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="the page is tested with selenium, of the extra `dev`")
    browser = os.environ.get("CHROME") or shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver here: the page is tested in a real browser")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, f"--user-data-dir={folder}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        yield Page(driver=chrome)
    finally:
        chrome.quit()
