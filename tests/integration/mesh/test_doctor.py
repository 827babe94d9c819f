"""`meshserve doctor` on a real mesh, in health and while a service hangs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.support.mesh import Mesh


def doctor(mesh: Mesh) -> tuple[int, dict[str, list[dict[str, str]]]]:
    result = subprocess.run(
        [sys.executable, "-m", "meshserve", "doctor", "--json", "--config", str(mesh.config)],
        env=mesh.environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return result.returncode, json.loads(result.stdout)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_healthy_mesh_is_found_healthy(mesh: Mesh) -> None:
    code, found = doctor(mesh)
    problems = [each for section in found.values() for each in section if each["state"] != "ok"]
    assert (code, problems) == (0, [])
    texts = [each["text"] for each in found["mesh"]]
    assert "all 5 services are serving" in texts
    assert "the model 'smollm2-135m' is ready" in texts
    assert any(text.startswith("a request is answered, its first token after") for text in texts)
    assert "all 6 replicas are serving" in texts
    assert any(each["text"].startswith("traces are taken at") for each in found["settings"])


def test_a_service_that_hangs_is_named_with_its_log(mesh: Mesh) -> None:
    with stopped(mesh.process("safety")):
        code, found = doctor(mesh)
    mesh.wait_until_ready()
    assert code == 1
    hung = [each for each in found["mesh"] if each["state"] == "problem"]
    assert any(
        each["text"].startswith("the safety at ") and each["remedy"].endswith("safety.log")
        for each in hung
    )
