"""The console as somebody uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

WAIT_S = 20.0


class Page:
    """One tab with the console in it."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        self.expected_complaints: tuple[str, ...] = ()

    def open(self, name: str = "playground", key: str | None = None) -> None:
        """Opens a page anew, with nothing kept of the tests before."""
        self.driver.get(f"{self.url}/healthz")
        self.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
        if key is not None:
            self.driver.execute_script("sessionStorage['meshserve.key'] = arguments[0]", key)
        self.driver.get(f"{self.url}/#/{name}")
        self.until(lambda: self.all("#pages a"))

    def leave(self) -> None:
        """Goes to an empty page, which ends what is watched."""
        self.driver.get("about:blank")

    def until(self, condition: Callable[[], Any], within_s: float = WAIT_S) -> Any:
        """What the condition gives once it holds. The page may change while it is looked at."""
        waiting = WebDriverWait(
            self.driver,
            within_s,
            poll_frequency=0.05,
            ignored_exceptions=(StaleElementReferenceException,),
        )
        return waiting.until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The element, once it is there."""
        found: list[WebElement] = self.until(lambda: self.all(selector))
        return found[0]

    def button(self, name: str, within: str = "body") -> WebElement:
        """The last button of that name or label, once it is there and can be pressed."""

        def found() -> WebElement | None:
            buttons = [
                each
                for each in self.all(f"{within} button")
                if name in (each.text, each.get_attribute("aria-label")) and each.is_enabled()
            ]
            return buttons[-1] if buttons else None

        button: WebElement = self.until(found)
        return button

    def ask(self, text: str) -> None:
        self.until(lambda: self.all(".parameters select option"))
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def answers(self) -> list[str]:
        return [each.text for each in self.all(".message.model .answer")]

    def answered(self, number: int = 1) -> str:
        """The last answer of so many, once it is complete."""

        def complete() -> str | None:
            messages = self.all(".message.model")
            done = len(messages) == number and messages[-1].get_attribute("aria-busy") == "false"
            return self.answers()[-1] if done else None

        answer: str = self.until(complete)
        return answer

    def announced(self) -> str:
        return str(self.one("#announcer").get_attribute("textContent"))

    def violations(self, axe: str) -> list[str]:
        """What axe-core finds against WCAG 2.2 A and AA and its own best practices."""
        self.driver.execute_script(axe)
        found = self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            axe.run(document, {resultTypes: ["violations"]}).then((results) => done(
              results.violations.flatMap((violation) => violation.nodes.map((node) =>
                `${violation.id}: ${node.target} ${node.failureSummary}`))));
            """
        )
        return list(found)
