"""Programs that a test needs and pip does not bring."""

from __future__ import annotations

import os
import shutil

import pytest


def require_program(name: str, package: str | None = None) -> str:
    """The path of a program of the system; where it is missing the test is skipped, but in CI,
    which installs all of them, it fails.

    `package` is what brings it on Debian, if that is called otherwise.
    """
    path = shutil.which(name)
    if path is not None:
        return path
    missing = f"{name} is not installed: apt-get install {package or name}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
