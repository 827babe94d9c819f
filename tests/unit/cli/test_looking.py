"""`meshserve status`, `meshserve models` and help: what is there, for people and for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from meshserve.supervisor.statedir import RunningMesh, ServiceEntry, StateDir
from meshserve.v1 import gateway_pb2, gateway_pb2_grpc
from tests.fakes.scripted_gateway import ScriptedGateway

Status = health_pb2.HealthCheckResponse
MODEL = gateway_pb2.Model(
    name="smollm2-135m",
    architecture="llama",
    parameters=134_500_000,
    context_tokens=8192,
    dtype="float32",
    ready=True,
    is_default=True,
)


@pytest.fixture
def health_servicer() -> health.HealthServicer:
    return health.HealthServicer()


@pytest.fixture
def target(gateway: ScriptedGateway, health_servicer: health.HealthServicer) -> Iterator[str]:
    """A scripted gateway that serves health as well."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    gateway_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def test_a_healthy_mesh_is_shown_and_exits_with_0(
    gateway: ScriptedGateway, target: str, meshserve: Callable, tmp_path: Path
) -> None:
    gateway.answer("ListModels", gateway_pb2.ListModelsResponse(models=[MODEL]))
    state = StateDir(tmp_path / "state")
    state.acquire()
    entry = ServiceEntry("gateway", target)
    state.write(RunningMesh(1, entry, (ServiceEntry("engine", target), entry)))
    result = meshserve("status")
    state.release()
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0][:2] == ["engine", "serving"]
    assert lines[1][:2] == ["gateway", "serving"]
    assert "model smollm2-135m" in result.out
    assert "8192 tokens of context, default" in result.out


def test_one_service_that_is_not_serving_is_exit_code_3(
    gateway: ScriptedGateway,
    target: str,
    meshserve: Callable,
    health_servicer: health.HealthServicer,
    tmp_path: Path,
) -> None:
    gateway.answer("ListModels", gateway_pb2.ListModelsResponse(models=[MODEL]))
    state = StateDir(tmp_path / "state")
    state.acquire()
    entry = ServiceEntry("gateway", target)
    state.write(RunningMesh(1, entry, (ServiceEntry("engine", "127.0.0.1:1"), entry)))
    result = meshserve("status", "--json")
    state.release()
    assert result.code == 3
    document = json.loads(result.out)
    assert document["healthy"] is False
    assert [s["health"] for s in document["services"]] == ["unreachable", "serving"]
    assert document["models"][0]["name"] == "smollm2-135m"


def test_a_gateway_that_is_not_serving_is_exit_code_3(
    target: str, meshserve: Callable, health_servicer: health.HealthServicer
) -> None:
    health_servicer.set("", Status.NOT_SERVING)
    result = meshserve("status", "--target", target)
    assert result.code == 3
    assert "not serving" in result.out


def test_without_a_mesh_status_says_how_to_get_one(meshserve: Callable) -> None:
    result = meshserve("status", "--target", "127.0.0.1:1")
    assert result.code == 3
    assert "meshserve up" in result.err


def test_status_shows_the_services_when_the_models_cannot_be_listed(
    gateway: ScriptedGateway, target: str, meshserve: Callable
) -> None:
    def refuse(request: object, context: grpc.ServicerContext) -> object:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "a key is needed")

    gateway.on("ListModels", refuse)
    result = meshserve("status", "--target", target)
    assert result.code == 3
    assert "serving" in result.out
    assert "a key is needed" in result.err


def test_models_are_listed_from_the_gateway(gateway: ScriptedGateway, meshserve: Callable) -> None:
    gateway.answer("ListModels", gateway_pb2.ListModelsResponse(models=[MODEL]))
    result = meshserve("models", "list", "--target", gateway.target)
    assert result.out.split()[:2] == ["smollm2-135m", "ready"]
    result = meshserve("models", "list", "--json", "--target", gateway.target)
    assert json.loads(result.out)[0]["context_tokens"] == 8192


def test_models_of_this_machine_are_listed_offline(meshserve: Callable) -> None:
    result = meshserve("models", "list", "--offline")
    assert result.code == 0
    assert "meshserve models pull smollm2-135m" in result.out


def test_all_models_of_the_settings_are_pulled(
    meshserve: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.symlink_to(demo_model_path)
    config = tmp_path / "mesh.yaml"
    config.write_text(
        f"models: {{one: {{source: {demo_model_path}}}}}\n"
        f"engine: {{speculation: {{draft_model: {copy}}}}}\n"
    )
    monkeypatch.setenv("MESHSERVE_CONFIG", str(config))
    assert meshserve("models", "pull").out.splitlines() == [str(demo_model_path), str(copy)]


def test_a_local_model_is_described(meshserve: Callable, demo_model_path: Path) -> None:
    result = meshserve("models", "show", str(demo_model_path), "--json")
    document = json.loads(result.out)
    assert document["architecture"] == "llama"
    assert document["max_context_tokens"] == 8192
    result = meshserve("models", "pull", str(demo_model_path))
    assert result.out == f"{demo_model_path}\n"


@pytest.mark.parametrize("command", [(), ("up",), ("down",), ("chat",), ("models", "list")])
def test_help_is_there_for_every_command(meshserve: Callable, command: tuple[str, ...]) -> None:
    result = meshserve(*command, "--help")
    assert result.code == 0
    assert result.out.startswith("Usage: meshserve")


def test_what_talks_to_a_gateway_needs_no_services() -> None:
    """`pip install meshserve` alone gives chat, generate, status and the client."""
    script = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        root = name.partition('.')[0]
        if root in {'services', 'torch', 'numpy', 'pydantic', 'yaml', 'uvloop', 'opentelemetry'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
from meshserve.cli.main import run
import meshserve
for command in (['chat'], ['generate', 'x'], ['status'], ['models', 'list']):
    code = run([*command, '--target', '127.0.0.1:1'])
    assert code == 3, (command, code)
assert run(['down']) == 0
assert run(['up']) == 1
assert run(['models', 'pull', 'smollm2-135m']) == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, input="hello", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'meshserve[all]'" in done.stderr
    assert "Traceback" not in done.stderr
