"""Each service in turn is killed under load: errors are clean, and the mesh heals by itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshserve
from tests.support.load import Load
from tests.support.mesh import SERVICES, Mesh
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

CLIENTS = 6
# What a caller may see while a service is away: try again, or nothing at all.
CLEAN = meshserve.ServiceUnavailableError


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("chaos")) as started:
        yield started


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [*SERVICES, "valkey"])
def test_the_mesh_survives_the_death_of(mesh: Mesh, victim: str) -> None:
    others = {name: mesh.process(name).pid for name in SERVICES if name != victim}
    killed = mesh.process(victim).pid
    with Load(lambda: mesh.client(timeout=60), clients=CLIENTS) as load:
        load.wait_for_more(CLIENTS)
        mesh.process(victim).send_signal(signal.SIGKILL)
        wait_until(lambda: _came_back(mesh, victim, killed), f"{victim} comes back", 90)
        mesh.wait_until_ready(timeout_s=90)
        load.wait_for_more()
    unexpected = [error for error in load.failures if not isinstance(error, CLEAN)]
    assert not unexpected, f"{unexpected[:5]}\n{mesh.logs()}"
    assert not load.truncated, "a failed stream looked like a finished one"
    assert {name: mesh.process(name).pid for name in others} == others, "another service died too"
    print(f"{victim}: {load.answered} answers, {len(load.failures)} failures")


def _came_back(mesh: Mesh, victim: str, killed: int) -> bool:
    try:
        return mesh.process(victim).pid != killed
    except LookupError:
        return False


@pytest.mark.timeout(180)
def test_a_stalled_engine_core_turns_unhealthy_and_is_not_waited_for(mesh: Mesh) -> None:
    (core,) = mesh.process("engine").children()
    core.suspend()
    try:
        wait_until(lambda: not mesh.healthy("engine"), "a stalled core is noticed")
        started = time.monotonic()
        with mesh.client(timeout=30) as client, pytest.raises(CLEAN):
            client.chat("Hello", max_tokens=4, cache=False)
        assert time.monotonic() - started < 10, "the caller was kept waiting"
    finally:
        core.resume()
    wait_until(lambda: mesh.healthy("engine"), "the engine comes back")
    with mesh.client() as client:
        assert client.chat("Hello", max_tokens=4, temperature=0, cache=False).text


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["tokenizer", "safety"])
def test_a_stream_goes_on_over_the_death_of_a_stateless_service(mesh: Mesh, victim: str) -> None:
    prompt = "Write a long story about a lighthouse."
    with mesh.client(timeout=120) as client:
        undisturbed = client.chat(
            prompt, max_tokens=150, temperature=0, ignore_eos=True, cache=False
        )
        with client.stream_chat(
            prompt, max_tokens=150, temperature=0, ignore_eos=True, cache=False
        ) as stream:
            pieces = []
            for chunk in stream:
                pieces.append(chunk.text)
                if len(pieces) == 5:
                    mesh.process(victim).send_signal(signal.SIGKILL)
    mesh.wait_until_ready(timeout_s=60)
    assert "".join(pieces) == undisturbed.text


@pytest.mark.timeout(120)
def test_ctrl_c_ends_everything_cleanly(tmp_path: Path, demo_model_path: Path) -> None:
    mesh = Mesh(tmp_path)
    mesh.start()
    pids = [mesh.process(name) for name in (*SERVICES, "valkey")]
    assert mesh.stop() == 0
    assert not any(process.is_running() for process in pids)
