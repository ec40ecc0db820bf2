"""Headless Chromium on the server's page, by way of Selenium.

Invariant: a page begins with an empty profile, and the browser talks to nothing but the page.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def find(*names: str) -> str:
    """The path of the first of these programs that is here."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeError(f"{names[0]} is not here; on Debian: apt-get install chromium chromium-driver")


class Page:
    """The page in a window."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get(address)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], object], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing happened; the status is {self.status!r}")
            time.sleep(0.02)

    def wait_until_ready(self) -> None:
        self.wait(lambda: self.one("#go").is_enabled() and self.all("#loss svg"))

    @property
    def status(self) -> str:
        return self.one("#status").text

    @property
    def text(self) -> str:
        return self.run("return document.getElementById('text').textContent")

    def ask(self, prompt: str) -> None:
        """Types a prompt and waits for the end of its continuation."""
        self.one("#prompt").clear()
        self.one("#prompt").send_keys(prompt)
        self.one("#go").click()
        self.wait_until_done()

    def wait_until_done(self) -> None:
        self.wait(lambda: self.status.endswith("done"))

    def hover(self, index: int) -> list[str]:
        """Points at a token; the alternatives that are then shown, as a screen reader reads them."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element(self.all("#text .token")[index]).perform()
        self.wait(lambda: self.one("#choices").is_displayed())
        return [button.get_attribute("aria-label") for button in self.all("#choices button")]

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextlib.contextmanager
def chromium() -> Iterator:
    """The driver of a browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = find("chromium", "google-chrome")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*QUIET, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(find("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


@contextlib.contextmanager
def visiting(driver, address: str) -> Iterator[Page]:
    """The page at this address, 1200 × 860, in a tab that finds nothing of those before."""
    home = driver.current_window_handle
    driver.switch_to.new_window("tab")
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "all"})
    try:
        page = Page(driver, address)
        page.size(1200, 860)
        yield page
    finally:
        driver.get_log("browser")  # what it said is not the next one's
        driver.close()
        driver.switch_to.window(home)


@contextlib.contextmanager
def browsing(address: str) -> Iterator[Page]:
    """The page at this address in a browser of its own."""
    with chromium() as driver, visiting(driver, address) as page:
        yield page
