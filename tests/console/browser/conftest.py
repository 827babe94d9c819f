"""A browser before a gateway, and a mesh whose engine says what a test wants."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from tests.console.browser.page import Page
from tests.fakes.scripted_mesh import Engine, ScriptedMesh
from tests.support.browser import chromium, complaints, requested_urls
from tests.support.ports import free_ports
from tests.support.programs import require_program

AXE_VERSION = "4.14.1"


class RunningMesh:
    """A scripted mesh in an event loop and a thread of its own."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        (port,) = free_ports(1)
        gateway = {"http_listen": f"127.0.0.1:{port}", **sections.pop("gateway", {})}
        self._mesh = ScriptedMesh(folder, gateway=gateway, **sections)
        self.run(self._mesh.__aenter__())
        self.url = self._mesh.http_url
        self.engine: Engine = self._mesh.engine

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        # What is watched ends as it does when a gateway shuts down.
        self._loop.call_soon_threadsafe(self._mesh.gateway.draining.set)
        self.run(self._mesh.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[RunningMesh]:
    """A mesh whose engine says what `scripted.engine.script` lets it say."""
    mesh = RunningMesh(tmp_path)
    yield mesh
    mesh.close()


@pytest.fixture
def page(browser: webdriver.Chrome, scripted: RunningMesh) -> Iterator[Page]:
    """The console of the scripted mesh. Whatever is done with it, nothing is asked of another host,
    and nothing is complained of."""
    page = Page(browser, scripted.url)
    yield page
    page.leave()
    assert_clean(browser, scripted.url, page.expected_complaints)


def assert_clean(browser: webdriver.Chrome, url: str, expected: tuple[str, ...] = ()) -> None:
    """Fails when pages asked others, or complained of what a test did not expect."""
    strangers = {
        each for each in requested_urls(browser) if not each.startswith((url, "chrome:", "data:"))
    }
    assert strangers == set()
    unexpected = [
        each for each in complaints(browser) if not any(part in each for part in expected)
    ]
    assert unexpected == []


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, fetched once into the user's cache."""
    npm = require_program("npm")
    folder = Path.home() / ".cache" / "meshserve-tests" / f"axe-core-{AXE_VERSION}"
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "install", "--prefix", str(folder), "--no-save", f"axe-core@{AXE_VERSION}"],
            check=True,
            capture_output=True,
        )
    return source.read_text()
