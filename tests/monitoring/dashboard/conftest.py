"""A dashboard on loopback, and a browser to look at it."""

import json
import os
import shutil
from pathlib import Path

import httpx2
import pytest

from resilience_kit.monitoring import sampler
from resilience_kit.monitoring.dashboard import create_app, running

_AXE = Path(__file__).parent / "axe" / "axe.min.js"
# As long as a machine with much else to do may take.
_PATIENCE = 15


@pytest.fixture(autouse=True)
def own_sampler(monkeypatch):
    """A sampler that knows nothing of the tests before, for the test's dashboards to share."""
    monkeypatch.setattr(sampler, "_shared", None)
    yield
    if sampler._shared is not None:
        sampler._shared.stop()


@pytest.fixture
def serve():
    """Serve dashboards, each until the test ends; gives a client of each."""
    opened = []

    def start(**options):
        server = running(create_app(**options), port=0)
        client = httpx2.Client(base_url=server.__enter__(), trust_env=False)
        opened.append((server, client))
        return client

    yield start
    for server, client in opened:
        client.close()
        server.__exit__(None, None, None)


class Browser:
    """Headless Chromium, as a user's eyes and hands."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, client, *, width=1200, dark=False):
        """Open a dashboard, and wait until it shows figures."""
        self.look(width=width, dark=dark)
        self.driver.get(str(client.base_url))
        self.until("return document.querySelector('#link').classList.contains('live')")

    def look(self, *, width=1200, dark=False):
        """Be a screen of this width, whose user likes it dark or not."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def text(self, selector):
        """The text of an element as it is shown; "" where there is none."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def run(self, script, *arguments):
        """Run a function's body in the page."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script, *arguments, seconds=_PATIENCE):
        """Wait until a function's body returns something that is true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.run(script, *arguments))

    def click(self, selector):
        """Click on an element."""
        self.driver.find_element("css selector", selector).click()

    def complaints(self):
        """What the page's console has told: errors, and what the policy forbade."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """The URLs of all that was asked for since the last time."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [it["params"]["request"]["url"] for it in messages if it["method"] == "Network.requestWillBeSent"]

    def accessibility_problems(self):
        """What axe-core finds that is serious or critical: rule, and elements."""
        # as an extension would, past the page's policy
        self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": _AXE.read_text(encoding="utf-8")})
        found = self.driver.execute_async_script("axe.run().then(arguments[0])")
        return [
            (it["id"], [node["html"] for node in it["nodes"]])
            for it in found["violations"]
            if it["impact"] in ("serious", "critical")
        ]


@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests; where there is none, those that need it are skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium and its driver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = "127.0.0.1,localhost"
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()
    if before is None:
        del os.environ["NO_PROXY"]
    else:
        os.environ["NO_PROXY"] = before


@pytest.fixture
def browser(chromium):
    """The browser, with nothing of the test before in it."""
    browser = Browser(chromium)
    yield browser
    chromium.get("about:blank")
    chromium.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
    chromium.get_log("browser")
    chromium.get_log("performance")
