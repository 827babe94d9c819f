"""The playground in a browser: answers, tokens, branches, errors, and what a model may write."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from selenium.webdriver.common.keys import Keys

from services.runtime.errors import Reason, ServiceError
from tests.console.browser.conftest import RunningMesh
from tests.console.browser.page import Page
from tests.fakes.scripted_mesh import EngineRequest, EngineResponse, chunk, encode, says

pytestmark = pytest.mark.slow


async def endless(request: EngineRequest) -> AsyncIterator[EngineResponse]:
    while True:
        yield chunk((0, encode("one ")))
        await asyncio.sleep(0.02)


def test_an_answer_comes_with_its_times(page: Page) -> None:
    page.open()
    page.ask("hello")
    assert page.answered() == "onetwo"
    facts = page.one(".facts").text
    assert "first token" in facts
    assert "tokens" in facts
    assert page.announced() == "The answer is complete."


def test_stop_ends_the_answer_here_and_in_the_engine(scripted: RunningMesh, page: Page) -> None:
    scripted.engine.script = endless
    page.open()
    page.ask("hello")
    page.until(lambda: "one one" in "".join(page.answers()))
    page.button("Stop").click()
    assert page.answered().startswith("one one")
    assert "stopped by you" in page.one(".facts").text
    page.until(lambda: scripted.engine.left == 1 and scripted.engine.active == 0)


def test_closing_the_tab_frees_the_engine(scripted: RunningMesh, page: Page) -> None:
    scripted.engine.script = endless
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open()
    page.ask("hello")
    page.until(lambda: scripted.engine.active == 1 and page.answers() != [""])
    page.driver.close()
    page.driver.switch_to.window(first)
    page.until(lambda: scripted.engine.left == 1 and scripted.engine.active == 0)


def test_another_answer_and_an_edited_message_are_branches(
    scripted: RunningMesh, page: Page
) -> None:
    page.open()
    page.ask("hello")
    page.answered()
    scripted.engine.script = says("STOP")
    page.button("Regenerate").click()
    page.until(lambda: page.answers() == ["STOP"])
    assert page.one(".branches").text == "2 / 2"
    page.button("The branch before").click()
    assert page.answers() == ["onetwo"]

    page.button("Edit").click()
    field = page.one(".editing textarea")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("other")
    page.button("Send as a branch").click()
    page.until(lambda: page.answers() == ["STOP"])
    assert [each.text for each in page.all(".bubble")] == ["other"]
    # What was said before the edit is a branch away, with its own answers below it.
    page.button("The branch before").click()
    assert [each.text for each in page.all(".bubble")] == ["hello"]
    assert page.answers() == ["onetwo"]


def test_a_conversation_outlives_a_reload(page: Page) -> None:
    page.open()
    page.ask("hello")
    page.answered()
    page.driver.refresh()
    assert page.answered() == "onetwo"


def test_parameters_and_the_conversation_reach_the_engine(
    scripted: RunningMesh, page: Page
) -> None:
    page.open()
    page.one("#parameter-temperature").send_keys("0.5")
    page.one("#parameter-seed").send_keys("18446744073709551615")
    page.one("#parameter-system").send_keys("Be brief.")
    limit = page.one("#parameter-max_tokens")
    limit.clear()
    limit.send_keys("7")
    page.one("#parameter-json_schema").send_keys('{"type": "string"}')
    page.ask("hello")
    page.answered()
    page.ask("again")
    page.answered(2)
    request = scripted.engine.requests[-1]
    assert request.sampling.temperature == 0.5
    assert request.sampling.seed == 2**64 - 1
    assert request.stopping.max_tokens == 7
    assert request.constraint.json_schema == '{"type": "string"}'
    assert request.logprobs == 5
    # The system prompt, both questions and the answer between them.
    assert list(request.prompt.ids) == encode("Be brief.\nhello\nonetwo\nagain\n")


def test_each_token_shows_how_likely_it_was(page: Page) -> None:
    page.open()
    page.ask("hello")
    page.answered()
    page.button("Tokens").click()
    assert [each.text for each in page.all(".token")] == ["one", "two"]
    tokens = page.one(".tokens")
    tokens.send_keys(Keys.ARROW_RIGHT)
    active = page.one(f"#{tokens.get_attribute('aria-activedescendant')}")
    assert active.text == "two"
    assert '"two"' in str(active.get_attribute("aria-label"))
    assert '"two"' in page.one(".alternatives").text


def test_an_error_says_its_reason_and_the_way_out(scripted: RunningMesh, page: Page) -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one ")))
        await asyncio.sleep(0.05)
        raise ServiceError(Reason.ENGINE_RESTARTED, "the core ended", retry_after_s=2)

    scripted.engine.script = script
    page.open()
    page.ask("hello")
    problem = page.one(".problem")
    assert "Engine restarted" in problem.text
    assert "the core ended" in problem.text
    assert "Wait 2" in problem.text
    # What had come stays, and another try is one press away.
    assert page.answered().strip() == "one"
    scripted.engine.script = says("two")
    page.button("Try again").click()
    page.until(lambda: page.answers() == ["two"])


def test_a_refused_request_names_the_field(page: Page) -> None:
    page.expected_complaints = ("status of 400",)
    page.open()
    page.one("#parameter-temperature").send_keys("1000")
    page.ask("hello")
    assert "sampling.temperature" in page.one(".problem").text


# --- what a model may write

HOSTILE = (
    "<img src=x onerror=hit()> <script>hit()</script> <svg/onload=hit()>\n"
    "[a link](javascript:hit()) ![a picture](http://127.0.0.1:9/x.png)\n"
    "`<b>code</b>` **<i>bold</i>**\n"
    "```<script>\n</code></pre><script>hit()</script>\n```\n"
    "- <iframe srcdoc='<script>hit()</script>'></iframe>\n"
    "&lt;script&gt;"
)


@pytest.mark.parametrize("view", ["Text", "Tokens"])
def test_what_a_model_writes_is_text_and_nothing_else(
    scripted: RunningMesh, page: Page, view: str
) -> None:
    scripted.engine.script = says(*HOSTILE)
    page.open()
    page.driver.execute_script("window.hits = 0; window.hit = () => (window.hits += 1)")
    page.ask(HOSTILE.replace("\n", " "))
    page.answered()
    page.button(view).click()
    log = page.one(".log")
    shown = str(log.get_attribute("textContent"))
    assert "<img src=x onerror=hit()>" in shown
    assert "&lt;script&gt;" in shown
    made = page.driver.execute_script(
        "return [...arguments[0].querySelectorAll('img, script, iframe, a, object, embed, style')]"
        ".map((element) => element.outerHTML)",
        log,
    )
    assert made == []
    assert page.driver.execute_script("return window.hits") == 0


def test_a_little_markdown_is_shown_as_it_is_meant(scripted: RunningMesh, page: Page) -> None:
    text = "# Title\n\n1. *one*\n2. **two**\n\n```python\nif a < b:\n    pass\n```\nend `code`"
    scripted.engine.script = says(*text)
    page.open()
    page.ask("hello")
    page.answered()
    made = page.driver.execute_script(
        "return [...arguments[0].querySelectorAll('*')].map((element) => element.localName)",
        page.one(".answer"),
    )
    of_code = ["div", "div", "span", "button", "svg", "path", "pre", "code"]
    assert made == ["p", "ol", "li", "em", "li", "strong", *of_code, "p", "code"]
    assert page.one(".answer pre").text == "if a < b:\n    pass"


def test_lists_within_lists_tables_and_quotes_are_shown_as_such(
    scripted: RunningMesh, page: Page
) -> None:
    scripted.engine.script = says(
        "1. a\n   - b\n\n   - c\n2. d\n\n",
        "| x | y |\n|---|:-:|\n| 1 | **2** |\n\n",
        "> said\n> - so\n\n* * *\n",
        "a | b is no table, and 2 > 1",
    )
    page.open()
    page.ask("hello")
    page.answered()

    def texts(selector: str) -> list[str]:
        return [each.text for each in page.all(f".answer {selector}")]

    assert texts("> ol > li") == ["a\nb\nc", "d"]
    assert texts("> ol > li > ul > li") == ["b", "c"]
    assert (texts("thead th"), texts("tbody td")) == (["x", "y"], ["1", "2"])
    assert texts("tbody strong") == ["2"]
    assert (texts("blockquote > p"), texts("blockquote > ul > li")) == (["said"], ["so"])
    assert len(page.all(".answer > hr")) == 1
    assert texts("> p") == ["a | b is no table, and 2 > 1"]


# --- the same as code


def test_the_code_of_a_request_says_what_was_asked(page: Page) -> None:
    page.open()
    page.one("#parameter-temperature").send_keys("0")
    page.ask('it\'s "quoted"')
    page.answered()
    page.button("Code").click()
    assert "temperature=0" in page.one("pre.code").text
    page.button("curl", "dialog").click()
    command = page.one("pre.code").text
    body = command.partition("-d '")[2].rpartition("'")[0].replace("'\\''", "'")
    (message,) = json.loads(body)["request"]["conversation"]["messages"]
    assert message == {"role": "ROLE_USER", "content": 'it\'s "quoted"'}
    page.button("Close").click()
    page.until(lambda: not page.all("dialog"))


def test_it_can_be_used_with_the_keys_alone(page: Page) -> None:
    page.open()
    page.until(lambda: page.all(".parameters select option"))
    driver = page.driver

    def press(*keys: str) -> None:
        driver.switch_to.active_element.send_keys(*keys)

    def tab_to(name: str) -> None:
        for _ in range(40):
            active = driver.switch_to.active_element
            if name in (
                active.text,
                active.get_attribute("aria-label"),
                active.get_attribute("id"),
            ):
                return
            press(Keys.TAB)
        raise AssertionError(f"{name!r} cannot be reached")

    tab_to("prompt")
    press("hello", Keys.ENTER)
    page.answered()
    tab_to("Skip to the content")
    press(Keys.ENTER)
    press(Keys.TAB)
    assert driver.switch_to.active_element.text == "New conversation"
    tab_to("Tokens")
    press(Keys.ENTER)
    tab_to("Tokens and their probabilities; the arrow keys move")
    press(Keys.END)
    assert '"two"' in page.one(".alternatives").text
    tab_to("Regenerate")
    press(Keys.ENTER)
    page.until(lambda: page.all(".branches"))
    page.answered()
    driver.get(f"{page.url}/#/requests")
    tab_to("Pause")
    press(Keys.ENTER)
    assert driver.switch_to.active_element.text == "Go on"
    press(Keys.TAB)
    assert driver.switch_to.active_element.text == "All"
