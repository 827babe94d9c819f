"""Takes the console's pictures in docs/images, of a mesh with the demo model and two engines.

`python docs/screenshots.py`; needs Chromium and its driver.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from selenium.webdriver.common.keys import Keys  # noqa: E402

import meshserve  # noqa: E402
from tests.console.browser.page import Page  # noqa: E402
from tests.support.browser import chromium, set_media, set_size  # noqa: E402
from tests.support.mesh import Mesh  # noqa: E402
from tests.support.ports import free_ports  # noqa: E402
from tests.support.process import ServiceProcess  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDE, NARROW = (1280, 820), (390, 820)
QUESTIONS = ("Tell me about rivers.", "Say hello.", "Count to ten.", "Name three colours.")
# Long enough for the window of rates and the first sparks of the charts.
WATCHED_S = 14.0


@contextmanager
def mesh(folder: Path) -> Iterator[Mesh]:
    """A mesh with two engines, of which tokens have a price."""
    (port,) = free_ports(1)
    started = Mesh(folder)
    engine = started.settings["engine"]
    engine["target"] = f"ipv4:{engine['listen']},127.0.0.1:{port}"
    price = {"prompt": 0.1, "completion": 0.4}
    # As it is served by default, not as the tests have it.
    started.settings["models"]["smollm2-135m"] |= {"dtype": "auto", "price": price}
    with started:
        settings = copy.deepcopy(started.settings)
        settings["engine"] |= {"listen": f"127.0.0.1:{port}", "metrics_listen": None}
        with ServiceProcess("engine", folder / "engine-2", settings) as second:
            second.wait_until_healthy(120)
            yield started


@contextmanager
def traffic(target: str) -> Iterator[None]:
    """A little of everything: answers, answers from the cache, refusals."""
    stopping = threading.Event()

    def ask() -> None:
        with meshserve.Client(target) as client:
            while not stopping.wait(0.3):
                drawn = random.random()
                try:
                    client.chat(
                        random.choice(QUESTIONS),
                        model="unheard-of" if drawn < 0.08 else "",
                        temperature=0 if drawn < 0.5 else 0.8,
                        max_tokens=random.randint(8, 40),
                    )
                except meshserve.MeshServeError:
                    continue

    workers = [threading.Thread(target=ask) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stopping.set()
        for worker in workers:
            worker.join()


def take(page: Page, name: str, theme: str) -> None:
    """One picture of what is shown."""
    set_media(page.driver, prefers_color_scheme=theme)
    time.sleep(0.4)
    page.driver.save_screenshot(str(IMAGES / f"console-{name}.png"))


def talk(page: Page) -> None:
    """A conversation of two answers, the second one looked at token by token."""
    page.open()
    page.one("#parameter-temperature").send_keys("0.6")
    page.one("#parameter-seed").send_keys("11")
    page.ask("In one short sentence: what is the capital of France?")
    page.answered(1)
    page.ask("And what is it known for? Answer in two sentences.")
    page.answered(2)
    page.button("Tokens").click()
    tokens = page.one(".tokens")
    for _ in range(6):
        tokens.send_keys(Keys.ARROW_RIGHT)
    page.driver.execute_script("scrollTo(0, document.documentElement.scrollHeight)")


def main() -> None:
    """Takes all pictures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mesh(Path(folder) / "mesh") as started,
        chromium(Path(folder) / "profile") as driver,
    ):
        page = Page(driver, f"http://127.0.0.1:{started.http_port}")
        set_size(driver, *WIDE)
        talk(page)
        take(page, "playground", "light")
        with traffic(started.target):
            page.open("mesh")
            time.sleep(WATCHED_S)
            take(page, "mesh", "dark")
            page.open("requests")
            time.sleep(2)
            # At once, before the table has changed again.
            driver.execute_script(
                "[...document.querySelectorAll('.requests tbody tr')].find((row) => "
                "/Stop|Length/.test(row.textContent)).querySelector('.expander').click()"
            )
            take(page, "requests", "light")
            page.open("models")
            time.sleep(2)
            take(page, "models", "dark")
            page.open("usage")
            time.sleep(2)
            take(page, "usage", "light")
            set_size(driver, *NARROW)
            page.open("mesh")
            time.sleep(WATCHED_S)
            page.driver.execute_script("scrollTo(0, 430)")
            take(page, "narrow", "dark")


if __name__ == "__main__":
    main()
