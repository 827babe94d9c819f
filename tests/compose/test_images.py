"""The images: small, with nothing that a running service does not need, and as nobody."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.compose.images import TAG, TARGETS

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3000)]

SERVED = tuple(target for target in TARGETS if target != "cli")
# Without the base, which is the engine's or the registry's affair, none but the engine comes near.
LARGEST_BYTES = {"gateway": 250e6, "tokenizer": 350e6, "cache": 250e6, "safety": 250e6}
COMPILERS_AND_INSTALLERS = ("gcc", "g++", "cc", "make", "pip")


def inspected(environment: dict[str, str], target: str) -> dict[str, Any]:
    command = ["docker", "image", "inspect", f"meshserve/{target}:{TAG}"]
    result = subprocess.run(command, env=environment, capture_output=True, check=True)
    return dict(json.loads(result.stdout)[0])


def run_inside(environment: dict[str, str], target: str, *command: str) -> Any:
    """Runs a program in the image as Compose runs the service."""
    options = ["--rm", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--network=none"]
    return subprocess.run(
        [
            *["docker", "run", *options, "--entrypoint", command[0]],
            *[f"meshserve/{target}:{TAG}", *command[1:]],
        ],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("target", LARGEST_BYTES)
def test_an_image_is_small(images: dict[str, str], target: str) -> None:
    size_bytes = inspected(images, target)["Size"]
    print(f"{target}: {size_bytes / 1e6:.0f} MB")
    assert size_bytes < LARGEST_BYTES[target]


@pytest.mark.parametrize("target", SERVED)
def test_a_service_runs_as_nobody_and_is_watched(images: dict[str, str], target: str) -> None:
    config = inspected(images, target)["Config"]
    name = target.removesuffix("-cpu")
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["python", "-m", f"services.{name}"]
    assert config["Healthcheck"]["Test"] == ["CMD", "meshserve", "probe", name]


@pytest.mark.parametrize("target", SERVED)
def test_there_is_nothing_to_compile_or_install_with(images: dict[str, str], target: str) -> None:
    found = run_inside(
        images, target, "sh", "-c", f"command -v {' '.join(COMPILERS_AND_INSTALLERS)}"
    )
    assert found.stdout == ""


@pytest.mark.parametrize("target", SERVED)
def test_torch_is_in_the_engine_alone(images: dict[str, str], target: str) -> None:
    result = run_inside(images, target, "python", "-c", "import torch")
    assert (result.returncode == 0) == (target == "engine-cpu"), result.stderr


def test_the_engine_has_its_kernels_for_every_instruction_set(images: dict[str, str]) -> None:
    script = (
        "from services.engine.core.kernels.cpu.build import INSTRUCTION_SETS\n"
        "from services.engine.core.kernels.cpu.build import PACKAGE, Recipe\n"
        "(library,) = Recipe().find(PACKAGE)\n"
        "content = library.read_bytes()\n"
        "assert all(name.encode() in content for name in INSTRUCTION_SETS)\n"
    )
    result = run_inside(images, "engine-cpu", "python", "-c", script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("target", SERVED)
def test_a_service_says_in_one_line_what_is_wrong_with_its_settings(
    images: dict[str, str], target: str
) -> None:
    name = target.removesuffix("-cpu")
    result = run_inside(
        images, target, "env", "MESHSERVE_GATEWAI=1", "python", "-m", f"services.{name}"
    )
    assert result.returncode == 78
    assert "did you mean 'gateway'" in result.stderr
