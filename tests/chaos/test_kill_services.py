"""Each service in turn is killed under load: errors are clean, and the mesh heals by itself."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshserve
from tests.support.mesh import SERVICES, Mesh

pytestmark = pytest.mark.slow

CLIENTS = 6
# What a caller may see while a service is away: try again, or nothing at all.
CLEAN = meshserve.ServiceUnavailableError


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("chaos")) as started:
        yield started


class Load:
    """Clients that chat all the time, and what came of it."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._chat, args=(number,)) for number in range(CLIENTS)
        ]
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.truncated: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=90)
        assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"

    def _chat(self, number: int) -> None:
        turn = 0
        with self._mesh.client(timeout=60) as client:
            while not self._stop.is_set():
                turn += 1
                try:
                    with client.stream_chat(
                        f"Count to {turn % 7 + 3}, client {number}.",
                        max_tokens=12,
                        temperature=0,
                        ignore_eos=True,
                        cache=bool(turn % 2),
                    ) as stream:
                        answer = stream.collect()
                except CLEAN as error:
                    self.outcomes[f"{type(error).__name__} {error.reason}"] += 1
                    time.sleep(0.1)
                except meshserve.MeshServeError as error:
                    self.unexpected.append(f"{type(error).__name__} {error.reason}: {error}")
                else:
                    self.outcomes["answered"] += 1
                    if answer.usage.completion_tokens != 12:
                        self.truncated.append(answer.text)


def wait_until(condition: object, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [*SERVICES, "valkey"])
def test_the_mesh_survives_the_death_of(mesh: Mesh, victim: str) -> None:
    others = {name: mesh.process(name).pid for name in SERVICES if name != victim}
    killed = mesh.process(victim).pid
    with Load(mesh) as load:
        wait_until(lambda: load.outcomes["answered"] >= 3, 60, "no load")
        mesh.process(victim).send_signal(signal.SIGKILL)
        wait_until(lambda: _came_back(mesh, victim, killed), 90, f"{victim} stays away")
        mesh.wait_until_ready(timeout_s=90)
        before = load.outcomes["answered"]
        wait_until(lambda: load.outcomes["answered"] >= before + CLIENTS, 60, "no more answers")
    assert not load.unexpected, f"{load.unexpected[:5]}\n{mesh.logs()}"
    assert not load.truncated, "a failed stream looked like a finished one"
    assert {name: mesh.process(name).pid for name in others} == others, "another service died too"
    print(victim, dict(load.outcomes))


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
        wait_until(lambda: not mesh.healthy("engine"), 10, "a stalled core passes for healthy")
        started = time.monotonic()
        with mesh.client(timeout=30) as client, pytest.raises(CLEAN):
            client.chat("Hello", max_tokens=4, cache=False)
        assert time.monotonic() - started < 10, "the caller was kept waiting"
    finally:
        core.resume()
    wait_until(lambda: mesh.healthy("engine"), 20, "the engine does not come back")
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
