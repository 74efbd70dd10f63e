"""A real browser without a window: Debian's Chromium, driven by Selenium. `make browser` installs it."""

import base64
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is 64 MiB in a container
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",
)


class Browser:
    """One page in Chromium, with everything that it asked for and complained about.

    Attributes
    ----------
    driver : selenium.webdriver.Chrome
        For what is not here.
    requests : list of str
        Addresses that pages asked for since `open`, data: excluded. `look` brings it up to date.
    errors : list of str
        Errors on the console since `open`: exceptions, failed requests, what the Content-Security-Policy refused.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, url: str, *, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """Open `url` with a viewport of `width` x `height` (600 and less is a phone) and a "light" or "dark" colour scheme."""
        phone = width <= 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get("about:blank")
        self.look()
        self.requests, self.errors = [], []
        self.driver.get(url)

    def run(self, script: str) -> object:
        """Return what `script`, the body of a function, returns in the page."""
        return self.driver.execute_script(script)

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches."""
        return str(self.run(f"return document.querySelector({json.dumps(selector)}).textContent.trim()"))

    def wait(self, script: str, seconds: float = 30) -> None:
        """Wait until `script`, an expression, holds in the page."""
        WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(
            lambda driver: driver.execute_script(f"return {script}"), script
        )

    def look(self) -> None:
        """Read what the browser logged into `requests` and `errors`."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("data:", "about:", "blob:")):
                    self.requests.append(url)
        self.errors += [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> Path:
        """Write the whole page, not only what is in the viewport, to a PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium with an empty profile; skip the test where there is none."""
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found: `make browser` installs them on Debian, as root.")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options, Service(found["chromedriver"]))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
