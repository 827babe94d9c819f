"""A Docker engine, the images, and one stack that the tests of a module share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.compose.docker_engine import NoEngineError, docker_engine
from tests.compose.images import build_images
from tests.compose.stack import Stack


@pytest.fixture(scope="session")
def docker() -> Iterator[dict[str, str]]:
    """The environment in which docker and Compose work."""
    try:
        with docker_engine() as environment:
            yield environment
    except NoEngineError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def images(docker: dict[str, str]) -> dict[str, str]:
    """The same, once the images of this checkout are there."""
    build_images(docker)
    return docker


@pytest.fixture(scope="module")
def stack(images: dict[str, str]) -> Iterator[Stack]:
    """The whole mesh, started and healthy."""
    stack = Stack(images)
    try:
        stack.up()
        stack.wait_until_healthy()
        yield stack
    finally:
        stack.down()
