"""`meshserve doctor`: what it finds, what it says to do, and how it exits."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from meshserve.cli.doctor import machine
from meshserve.cli.doctor.mesh import of_replicas
from meshserve.supervisor.statedir import RunningMesh, ServiceEntry, StateDir
from meshserve.v1 import gateway_pb2, mesh_pb2, monitor_pb2
from services.engine.core.kernels.device_check import Verdicts
from services.runtime.settings import Settings
from tests.fakes.scripted_gateway import ScriptedGateway
from tests.support.ports import free_ports

SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety")


@pytest.fixture(autouse=True)
def own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports that no other mesh on this machine has."""
    ports = free_ports(2 * len(SERVICES) + 2)
    for name in SERVICES:
        prefix = f"MESHSERVE_{name.upper()}__"
        monkeypatch.setenv(f"{prefix}LISTEN", f"127.0.0.1:{ports.pop()}")
        monkeypatch.setenv(f"{prefix}METRICS_LISTEN", f"127.0.0.1:{ports.pop()}")
    monkeypatch.setenv("MESHSERVE_GATEWAY__HTTP_LISTEN", f"127.0.0.1:{ports.pop()}")
    monkeypatch.setenv("MESHSERVE_VALKEY__EMBEDDED_PORT", str(ports.pop()))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def findings(out: str, state: str) -> list[str]:
    """What was found to be in a state, each with its remedy, on one line."""
    found: list[str] = []
    for line in out.splitlines():
        if line.startswith(f"  {state} "):
            found.append(line.removeprefix(f"  {state}").strip())
        elif line.startswith(" " * 11) and found and previous_is_of(out, line, state):
            found[-1] += f" | {line.strip()}"
    return found


def previous_is_of(out: str, line: str, state: str) -> bool:
    before = out[: out.index(line)].splitlines()
    first = next(each for each in reversed(before) if not each.startswith(" " * 11))
    return first.startswith(f"  {state} ")


def test_where_all_is_well_nothing_but_a_model_to_pull_is_found(meshserve: Callable) -> None:
    result = meshserve("doctor")
    assert result.code == 0
    assert findings(result.out, "problem") == []
    (to_pull,) = findings(result.out, "warning")
    assert "'smollm2-135m' is not here yet" in to_pull
    assert "meshserve models pull" in to_pull
    assert "no mesh runs here; `meshserve up` starts one" in result.out


def test_settings_that_cannot_be_read_are_told_line_by_line(
    meshserve: Callable, tmp_path: Path
) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text("gateway: {lisen: 1, default_timeout_s: -1}\n")
    result = meshserve("doctor", "--config", str(config))
    assert result.code == 1
    range_, unknown = findings(result.out, "problem")
    assert "gateway.lisen: unknown key; did you mean 'listen'?" in unknown
    assert "gateway.default_timeout_s" in range_
    assert "docs/configuration.md" in range_


def test_a_port_that_is_taken_is_told_with_the_setting_that_changes_it(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    monkeypatch.setenv("MESHSERVE_CACHE__LISTEN", f"127.0.0.1:{taken_port}")
    result = meshserve("doctor")
    assert result.code == 1
    (taken,) = findings(result.out, "problem")
    assert f"port {taken_port} is in use" in taken
    assert "MESHSERVE_CACHE__LISTEN" in taken


def test_what_cannot_be_reached_is_named_with_its_setting(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports(1)[0]
    monkeypatch.setenv("MESHSERVE_VALKEY__URL", f"redis://:secret@127.0.0.1:{port}/0")
    monkeypatch.setenv("MESHSERVE_TELEMETRY__OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MESHSERVE_TOKENIZER__TARGET", "dns:///tokenizer.invalid:50052")
    result = meshserve("doctor")
    assert result.code == 1
    valkey, tokenizer = findings(result.out, "problem")
    assert "Valkey cannot be used" in valkey
    assert "valkey.url" in valkey
    assert "tokenizer.target: 'tokenizer.invalid' has no address" in tokenizer
    assert any("nobody takes traces" in each for each in findings(result.out, "warning"))
    assert "secret" not in result.out + result.err


def test_a_gateway_that_everybody_reaches_is_warned_of(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"0.0.0.0:{free_ports(1)[0]}"
    monkeypatch.setenv("MESHSERVE_GATEWAY__LISTEN", address)
    (no_key,) = findings(meshserve("doctor").out, "problem")
    assert "need an API key, and none is configured" in no_key
    monkeypatch.setenv("MESHSERVE_GATEWAY__AUTH__MODE", "off")
    result = meshserve("doctor")
    assert result.code == 0
    warnings = findings(result.out, "warning")
    assert any(f"whoever reaches {address}" in each for each in warnings)
    assert any("in the clear" in each for each in warnings)


def test_a_file_of_keys_counts_and_a_broken_one_is_told(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"[{{name: team, sha256: {'a' * 64}}}]")
    monkeypatch.setenv("MESHSERVE_GATEWAY__LISTEN", f"0.0.0.0:{free_ports(1)[0]}")
    monkeypatch.setenv("MESHSERVE_GATEWAY__AUTH__KEYS_FILE", str(keys))
    assert "need one of 1 API keys" in meshserve("doctor").out
    keys.write_text("[{name: team}]")
    (broken,) = findings(meshserve("doctor").out, "problem")
    assert "keys.yaml" in broken
    assert "gateway.auth.keys_file" in broken


def test_a_certificate_without_its_key_is_found_out(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        subprocess.run(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
            f"-subj /CN=localhost -keyout {name}.key -out {name}.pem",
            shell=True,
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    pair = f"{{certificate: {tmp_path}/one.pem, private_key: {tmp_path}/other.key}}"
    monkeypatch.setenv("MESHSERVE_ENGINE__TLS", pair)
    result = meshserve("doctor")
    assert result.code == 1
    (mismatch,) = findings(result.out, "problem")
    assert "engine.tls cannot be used" in mismatch
    assert "other.key" in mismatch
    monkeypatch.setenv("MESHSERVE_ENGINE__TLS", pair.replace("other.key", "one.key"))
    fitting = meshserve("doctor").out
    assert "the engine's certificate and key belong together" in fitting
    assert any("certificate expires in 1.0 days" in each for each in findings(fitting, "warning"))


def test_models_that_cannot_be_served_are_told(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF then nothing")
    monkeypatch.setenv(
        "MESHSERVE_MODELS", f"{{a: {{source: {broken}}}, b: {{source: {tmp_path}/none.gguf}}}}"
    )
    result = meshserve("doctor")
    assert result.code == 1
    damaged, missing = findings(result.out, "problem")
    assert "the model 'a'" in damaged
    assert "broken.gguf" in damaged
    assert "the model 'b': There is no file or directory" in missing


def test_too_few_open_files_and_a_folder_that_cannot_be_written_are_told(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHSERVE_CACHE", str(tmp_path / "file" / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        result = meshserve("doctor")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert result.code == 1
    assert any("MESHSERVE_CACHE" in each for each in findings(result.out, "problem"))
    assert any("512 files open" in each for each in findings(result.out, "warning"))


def test_a_service_that_does_not_serve_is_shown_with_the_end_of_its_log(
    meshserve: Callable, gateway: ScriptedGateway, tmp_path: Path
) -> None:
    gateway.answer("ListModels", gateway_pb2.ListModelsResponse())
    state = StateDir(tmp_path / "state")
    state.acquire()
    (state.log_dir / "engine.log").write_text(
        '{"time": "2026-01-01T00:00:00Z", "level": "error", "service": "engine", '
        '"logger": "x", "message": "out of memory"}\n'
    )
    gone = ServiceEntry("engine", f"127.0.0.1:{free_ports(1)[0]}")
    entry = ServiceEntry("gateway", gateway.target)
    state.write(RunningMesh(1, entry, (gone,)))
    result = meshserve("doctor")
    state.release()
    assert result.code == 1
    engine = next(each for each in findings(result.out, "problem") if "the engine at" in each)
    assert "is unreachable" in engine
    assert "out of memory" in engine
    assert "engine.log" in engine


def test_a_gateway_elsewhere_is_looked_at_alone(meshserve: Callable) -> None:
    result = meshserve("doctor", "--target", f"127.0.0.1:{free_ports(1)[0]}")
    assert result.code == 1
    assert not {"Machine", "Settings"}.intersection(result.out.splitlines())
    (away,) = findings(result.out, "problem")
    assert "no MeshServe gateway answers" in away


def test_what_is_found_is_there_as_json(meshserve: Callable) -> None:
    result = meshserve("doctor", "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert set(document) == {"machine", "settings", "mesh"}
    for found in document.values():
        assert all(set(each) == {"state", "text", "remedy"} for each in found)
        assert all(each["remedy"] for each in found if each["state"] != "ok")


def replica(service: str, state: str = "SERVING", **fields: str) -> mesh_pb2.ReplicaOverview:
    return mesh_pb2.ReplicaOverview(
        service=service,
        address="10.0.0.1:5",
        state=monitor_pb2.ReplicaState.Value(f"REPLICA_STATE_{state}"),
        **fields,
    )


def picture(**services: list[mesh_pb2.ReplicaOverview]) -> mesh_pb2.MeshSnapshot:
    return mesh_pb2.MeshSnapshot(
        services=[
            mesh_pb2.ServiceOverview(service=name, enabled=True, replicas=replicas)
            for name, replicas in services.items()
        ]
    )


def test_replicas_that_are_away_and_services_without_any_are_problems() -> None:
    away = replica("engine", "UNREACHABLE", problem="no answer within 1 s")
    unreachable, missing = sorted(
        each.text for each in of_replicas(picture(engine=[away, replica("engine")], tokenizer=[]))
    )[::-1]
    assert unreachable == "the engine at 10.0.0.1:5 is unreachable: no answer within 1 s"
    assert missing == "no replica of the tokenizer is known to the gateway"


def test_replicas_of_several_versions_are_a_warning() -> None:
    replicas = picture(
        engine=[replica("engine", version="1"), replica("engine", version="2")],
        valkey=[replica("valkey", version="9.1")],
    )
    mixed, serving = of_replicas(replicas)
    assert mixed.state == "warning"
    assert "1, 2" in mixed.text
    assert serving.text == "all 3 replicas are serving"


def test_of_a_card_it_says_which_kernels_are_not_used_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    verdicts: dict[tuple[str, str], str] = {}
    monkeypatch.setattr(
        machine, "known_verdicts", lambda *_: Verdicts(verdicts) if verdicts else None
    )

    def found() -> tuple[str, str]:
        card, kernels = machine.gpu(Settings(), tmp_path)
        assert card.text == "cuda:0 is A card, 3.0 of 4.0 GiB free"
        return kernels.state, kernels.text

    assert found()[1] == "the kernels for cuda:0 are checked at the first start of an engine"
    verdicts["rms_norm", "triton"] = ""
    assert found() == ("ok", "all 1 kernels compute on cuda:0 what they should")
    verdicts["paged_attention", "cuda"] = "it dies of SIGSEGV"
    state, text = found()
    assert state == "warning"
    assert text.startswith("1 of 2 kernels are not used on cuda:0, and others in their place")
    assert text.endswith("cuda of paged_attention: it dies of SIGSEGV")
