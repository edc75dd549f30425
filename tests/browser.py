"""A headless Chromium, one for all tests of a process."""

import shutil

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


class Browser:
    def __init__(self, folder):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS.split(), f"--user-data-dir={folder}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.set_script_timeout(30)

    def open(self, file):
        self.driver.get(f"file://{file}")
        self.ask("await viewer.ready")

    def ask(self, words, *args):
        """The value of an async function's body; `args` are its a, b, ..."""
        names = ", ".join("abcd"[: len(args)])
        call = f"(async ({names}) => {{ {words} }})(...Array.from(arguments).slice(0, -1))"
        done = "const done = arguments[arguments.length - 1];"
        answer = self.driver.execute_async_script(
            f"{done} {call}.then((value) => done({{ value }}), (error) => done({{ error: String(error) }}))", *args
        )
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def show(self, **change):
        maps = self.ask("await viewer.show(a); return [viewer.values('out'), viewer.values('in')]", change)
        return tuple(None if values is None else np.array(values) for values in maps)

    def values(self, direction):
        values = self.ask("return viewer.values(a)", direction)
        return None if values is None else np.array(values)

    def settled(self):
        """Wait for what a hand has begun."""
        self.ask("while (document.body.dataset.status === 'loading') await new Promise((r) => setTimeout(r, 5))")

    def text(self, selector):
        return self.driver.find_element("css selector", selector).text

    def point(self, selector, x, y, grid):
        """Move the mouse to the middle of a patch; returns the chain to go on with."""
        from selenium.webdriver import ActionChains

        frame = self.driver.find_element("css selector", selector)
        width, height = frame.size["width"], frame.size["height"]
        dx, dy = round(((x + 0.5) / grid[1] - 0.5) * width), round(((y + 0.5) / grid[0] - 0.5) * height)
        return ActionChains(self.driver, duration=0).move_to_element_with_offset(frame, dx, dy)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.driver.quit()
