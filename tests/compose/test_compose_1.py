"""Compose 1.29 brings up, scales, replaces and takes down the same stack. What the containers then
do is no affair of Compose's: test_stack.py, which takes Compose 2 where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.program import COMPOSE_1, require_compose
from tests.compose.stack import Stack
from tests.support.load import Load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def stack(images: dict[str, str]) -> Iterator[Stack]:
    stack = Stack(images, program=require_compose(COMPOSE_1))
    try:
        stack.up()
        stack.wait_until_healthy()
        yield stack
    finally:
        stack.down()


def test_the_published_port_answers(stack: Stack) -> None:
    with stack.client(timeout=60) as client:
        assert "Paris" in client.chat("What is the capital of France?", temperature=0).text


def test_engines_come_and_go_and_the_gateway_is_replaced_under_load(stack: Stack) -> None:
    with Load(lambda: stack.client(timeout=60)) as load:
        load.wait_for_more()
        stack.up(engine=3)
        stack.wait_until_healthy()
        wait_until(lambda: len(stack.containers("engine")) == 3, "there are three engines")
        load.wait_for_more()
        stack.up(engine=1)
        stack.roll("gateway")
        load.wait_for_more()
    assert not load.failures, load.failures[:5]


def test_nothing_is_left_of_it(stack: Stack) -> None:
    stack.down()
    of_it = ["--quiet", "--filter", f"label=com.docker.compose.project={stack.project}"]
    left = [
        stack.docker(*kind, *of_it) for kind in (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
    ]
    assert left == ["", "", ""]
