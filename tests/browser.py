"""A headless Chromium for the tests of pages, driven by selenium; what it may and may not have done is asked at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TOUCH = 44


class Browser:
    """One page at a time, at a width and in a colour scheme."""

    def __init__(self, folder: Path) -> None:
        program = next(filter(None, map(shutil.which, CHROMIUM)), None)
        driver = shutil.which("chromedriver")
        if program is None or driver is None:
            pytest.skip("no chromium with chromedriver on this machine: the pages were not clicked")
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = program
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}",
            "--disable-background-networking", "--hide-scrollbars",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.driver.get("about:blank")
        self.requests()  # those of the browser's own first page

    def open(self, page: Path, width: int = 1280, scheme: str = "light", script: bool = True) -> None:
        self._command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # nothing moves while it is clicked
        self._command("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in wishes.items()])
        self._command("Emulation.setScriptExecutionDisabled", value=not script)
        self.driver.get(page.as_uri())
        if script:
            assert self("return document.documentElement.dataset.ready") == "true", self.complaints()

    def __call__(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def click(self, selector: str) -> None:
        element = self.one(selector)
        self("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
        element.click()

    def click_at(self, x: float, y: float) -> None:
        """A real click of the mouse at a place of the window, in pixels."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """An option of a select, as its user's choice."""
        self(
            "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('input', {bubbles: true})); s.dispatchEvent(new Event('change', {bubbles: true}))",
            selector, value,
        )  # fmt: skip

    def small_targets(self) -> list[str]:
        """Visible controls that a finger may miss: less than 44 px high."""
        found: list[str] = self(
            "return [...document.querySelectorAll('button, select, input, summary, nav a')].filter(e => e.offsetParent"
            " && e.type !== 'range' && e.getBoundingClientRect().height < arguments[0] - 0.5).map(e => e.outerHTML.slice(0, 90))",
            TOUCH,
        )  # fmt: skip
        return found

    def too_wide(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self("return document.documentElement.scrollWidth - window.innerWidth"))

    def complaints(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call, images inside the page left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def _command(self, name: str, **parameters: Any) -> None:
        self.driver.execute_cdp_cmd(name, parameters)
