"""Compose, of which there are two: `docker-compose` 1.29, and `docker compose`, which is 2."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

COMPOSE_1, COMPOSE_2 = "docker-compose", "docker compose"
COMPOSE_PROGRAMS = (COMPOSE_1, COMPOSE_2)
SOURCES = {COMPOSE_1: "apt-get install docker-compose (of Debian 12)", COMPOSE_2: ".ci/compose-2"}


def require_compose(program: str) -> list[str]:
    """The program as the beginning of a command. Where it is missing the test is skipped, but in
    CI, which installs both, it fails."""
    if _is_installed(program):
        return program.split()
    missing = f"{program} is not installed: {SOURCES[program]}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def newest_compose() -> list[str]:
    """Compose 2 where it is installed, else 1.29."""
    return (COMPOSE_2 if _is_installed(COMPOSE_2) else COMPOSE_1).split()


def _is_installed(program: str) -> bool:
    if shutil.which(program.split()[0]) is None:
        return False
    asked = subprocess.run([*program.split(), "version", "--short"], capture_output=True, text=True)
    return asked.returncode == 0 and asked.stdout.lstrip("v").startswith(
        "1" if program == COMPOSE_1 else "2"
    )
