"""The other pages in a browser, over a scripted mesh and over the demo model's."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.console.browser.conftest import RunningMesh, assert_clean
from tests.console.browser.page import Page
from tests.fakes.scripted_mesh import says
from tests.support.browser import set_media, set_size
from tests.support.mesh import Mesh
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess

pytestmark = pytest.mark.slow

HOSTILE_NAME = "<img src=x onerror=hit()>\"'>"


@dataclass
class Demo:
    """A mesh with the demo model, two engines, and the console's page."""

    mesh: Mesh
    second_engine: ServiceProcess
    page: Page


@pytest.fixture(scope="module")
def demo_mesh(
    browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path
) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    (port,) = free_ports(1)
    mesh = Mesh(folder)
    engine = mesh.settings["engine"]
    engine["target"] = f"ipv4:{engine['listen']},127.0.0.1:{port}"
    engine["kv_cache_bytes"] = 64 * 2**20
    with mesh:
        settings = copy.deepcopy(mesh.settings)
        settings["engine"] |= {"listen": f"127.0.0.1:{port}", "metrics_listen": None}
        with ServiceProcess("engine", folder / "engine-2", settings) as second:
            second.wait_until_healthy(120)
            page = Page(browser, f"http://127.0.0.1:{mesh.http_port}")
            yield Demo(mesh, second, page)


@pytest.fixture
def demo(demo_mesh: Demo) -> Iterator[Demo]:
    yield demo_mesh
    demo_mesh.page.leave()
    assert_clean(demo_mesh.page.driver, demo_mesh.page.url)


# --- with the demo model


def test_an_answer_of_the_demo_model_is_streamed(demo: Demo) -> None:
    page = demo.page
    page.open()
    page.one("#parameter-temperature").send_keys("0")
    page.ask("In one short sentence: what is the capital of France?")
    assert "Paris" in page.answered()
    assert "tokens/s" in page.one(".facts").text
    page.button("Tokens").click()
    tokens = page.one(".tokens")
    tokens.send_keys(Keys.END)
    shown = "".join(str(each.get_attribute("textContent")) for each in page.all(".token"))
    assert " Paris" in shown
    assert len(page.all(".alternative")) >= 5


def test_the_python_code_gives_the_same_answer(demo: Demo) -> None:
    page = demo.page
    page.open()
    page.one("#parameter-temperature").send_keys("0")
    page.one("#parameter-stop").send_keys("zebra")
    page.ask("In one short sentence: what is the capital of France?")
    answer = page.answered()
    page.button("Code").click()
    code = page.one("pre.code").text
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == answer.split()
    page.button("Close").click()


def test_a_request_has_a_waterfall_of_its_stages(demo: Demo) -> None:
    with demo.mesh.client() as client:
        client.chat("Hello", max_tokens=3, request_id="seen-by-its-id", temperature=1)
    page = demo.page
    page.open("requests")
    page.one("input[type=search]").send_keys("seen-by")
    page.one("[aria-label$='stages of request seen-by-its-id']").click()
    stages = page.until(lambda: [each.text for each in page.all(".waterfall tbody th")])
    assert [each.split("\n")[0].split()[0] for each in stages][:3] == [
        "authenticate",
        "admit",
        "route",
    ]
    names = [each.split("\n")[0].split()[0] for each in stages]
    begin = names.index("generate")
    assert names[begin : begin + 4] == ["generate", "queue", "prefill", "decode"]
    assert all(each.size["width"] > 0 for each in page.all(".stage-bar"))


def test_the_map_shows_replicas_and_turns_one_that_is_killed_red(demo: Demo) -> None:
    page = demo.page
    page.open("mesh")
    page.until(lambda: len(page.all(".map .replica")) == 7)
    page.until(lambda: "all 7 replicas serving" in page.one(".badge").text)
    assert page.all(".map .replica.bad") == []
    with demo.mesh.client() as client:
        client.chat("Hello", max_tokens=8, cache=False)
    # The calls of the request move on the edges of the map.
    page.until(lambda: page.all(".map .flow[visibility=visible]"))
    demo.second_engine._process.kill()
    page.until(lambda: len(page.all(".map .replica.bad")) == 1)
    page.until(lambda: "1 of 7 replicas not serving" in page.one(".badge").text)
    assert demo.second_engine.address in page.one(".panel").text


def test_models_are_listed(demo: Demo) -> None:
    page = demo.page
    page.open("models")
    card = page.until(
        lambda: next(
            (each.text for each in page.all(".model-card") if "of 2 serving" in each.text), None
        )
    )
    assert "135M" in card
    assert "float32" in card


def test_what_one_has_used_is_counted(demo: Demo) -> None:
    page = demo.page

    def answer_tokens() -> int:
        return int(page.one("[aria-label='By model'] tbody td:nth-child(6)").text.replace(",", ""))

    with demo.mesh.client() as client:
        client.chat("Hello", max_tokens=2, cache=False)
        page.open("usage")
        before = page.until(answer_tokens)
        client.chat("Hello", max_tokens=3, temperature=0, cache=False)
    page.until(lambda: answer_tokens() == before + 3)
    assert "No rate limit" in page.one(".limit").text
    page.until(lambda: "anonymous" in page.one("[aria-label='All tenants']").text)


# --- who may see what


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def guarded(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Page]:
    """A gateway that asks for keys: `user` belongs to a tenant with a hostile name."""
    keys = [
        {"name": HOSTILE_NAME, "sha256": digest("user")},
        {"name": "ops", "sha256": digest("ops"), "operator": True},
    ]
    mesh = RunningMesh(tmp_path, gateway={"auth": {"mode": "required", "keys": keys}})
    mesh.engine.script = says("one")
    page = Page(browser, mesh.url)
    yield page
    page.leave()
    assert_clean(browser, mesh.url, ("status of 401", "status of 403"))
    mesh.close()


def enter_key(page: Page, key: str) -> None:
    field = page.one("#api-key")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(key, Keys.ENTER)


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(guarded: Page) -> None:
    page = guarded
    page.driver.get(page.url)
    page.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
    page.driver.refresh()
    enter_key(page, "wrong")
    page.until(lambda: "not known" in page.one("dialog").text)
    enter_key(page, "user")
    page.ask("hello")
    assert page.answered() == "one"
    assert page.driver.execute_script("return sessionStorage['meshserve.key']") == "user"
    assert page.driver.execute_script("return JSON.stringify(localStorage)") == "{}"


def test_only_operators_see_the_mesh_and_others_requests(guarded: Page) -> None:
    page = guarded
    page.open("playground", key="user")
    page.ask("hello")
    page.answered()
    page.open("mesh", key="user")
    assert "For operators" in page.one(".notice").text
    page.open("usage", key="user")
    assert "1" in page.one("[aria-label='By model'] tbody").text
    assert page.all("[aria-label='All tenants']") == []
    page.open("playground", key="ops")
    page.ask("hello")
    page.answered()
    page.open("requests", key="ops")
    page.until(lambda: len(page.all(".requests tbody tr")) == 2)
    page.open("requests", key="user")
    page.until(lambda: len(page.all(".requests tbody tr")) == 1)


def test_the_name_of_a_tenant_is_text_and_nothing_else(guarded: Page) -> None:
    page = guarded
    page.open("playground", key="user")
    page.ask("hello")
    page.answered()
    for name in ("requests", "usage", "mesh"):
        page.open(name, key="ops")
        if name != "mesh":
            page.until(lambda: HOSTILE_NAME in page.one("main").text)
        assert page.all("img") == []


# --- whoever looks


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_accessible(
    scripted: RunningMesh, page: Page, axe: str, theme: str, width: int
) -> None:
    scripted.engine.script = says("# a\n\n> b\n\n| c |\n|---|\n| d |\n\n```py\n", "e\n```\n")
    set_media(page.driver, prefers_color_scheme=theme)
    set_size(page.driver, width, 860)
    try:
        page.open()
        assert page.violations(axe) == []
        page.ask("hello")
        page.answered()
        assert page.violations(axe) == []
        page.button("Tokens").click()
        page.one(".tokens").send_keys(Keys.ARROW_RIGHT)
        assert page.violations(axe) == []
        page.driver.execute_script("scrollTo(0, document.documentElement.scrollHeight)")
        page.button("Code").click()
        assert page.violations(axe) == []
        page.button("Close").click()
        page.driver.execute_script("scrollTo(0, 0)")
        page.one("#parameter-temperature") if width > 1100 else page.one("summary").click()
        for name in ("mesh", "requests", "models", "usage"):
            page.open(name)
            page.until(lambda: page.all(".map, .requests, .model-card, .limit"))
            if name == "requests":
                page.one(".expander").click()
                page.one(".waterfall")
            assert page.violations(axe) == [], name
    finally:
        set_media(page.driver, prefers_color_scheme="")
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    set_size(page.driver, width, 860)
    try:
        page.open()
        page.ask("hello " + "word" * 100)
        page.answered()
        for name in ("playground", "mesh", "requests", "models", "usage"):
            page.driver.get(f"{page.url}/#/{name}")
            time.sleep(0.5)
            overflow = page.driver.execute_script(
                "return document.documentElement.scrollWidth - innerWidth"
            )
            assert overflow <= 0, name
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_colours_follow_the_system_until_one_chooses(page: Page) -> None:
    def ground() -> str:
        return str(
            page.driver.execute_script(
                "return getComputedStyle(document.documentElement).backgroundColor"
            )
        )

    set_media(page.driver, prefers_color_scheme="light")
    page.open()
    light = ground()
    set_media(page.driver, prefers_color_scheme="dark")
    dark = ground()
    assert dark != light
    page.button("Light colours").click()
    assert ground() == light
    page.driver.refresh()
    page.button("Dark colours")
    assert ground() == light
    set_media(page.driver, prefers_color_scheme="")


def test_a_browser_that_keeps_nothing_shows_the_pages_all_the_same(page: Page) -> None:
    """As one whose user has refused cookies and the like: asking for the storage throws."""
    denied = page.driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument",
        {
            "source": """
            const denied = () => { throw new DOMException("denied", "SecurityError"); };
            for (const area of ["localStorage", "sessionStorage"])
              Object.defineProperty(window, area, {get: denied});
            """
        },
    )
    try:
        page.driver.get(page.url)
        page.ask("hello")
        assert page.answered() == "onetwo"
        page.driver.get(f"{page.url}/#/requests")
        page.one(".requests")
        page.button("Dark colours").click()
        page.button("Light colours")
        page.driver.get(f"{page.url}/#/playground")
        assert page.answered() == "onetwo", "it is remembered until the page is closed"
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", denied)


def test_nothing_moves_for_those_who_want_it_still(page: Page) -> None:
    set_media(page.driver, prefers_reduced_motion="reduce")
    page.open("mesh")
    flow = page.one(".map .flow")
    assert flow.value_of_css_property("animation-name") == "none"
    set_media(page.driver, prefers_reduced_motion="")
