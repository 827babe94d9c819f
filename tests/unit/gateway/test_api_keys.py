"""API keys from a file: what changes there is in force whole, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway.api_keys import ApiKeys
from services.gateway.stages.authenticate import Authenticator
from services.runtime import file_watch
from services.runtime.errors import ServiceError
from services.runtime.server import StartupError
from services.runtime.settings import parse_settings
from services.runtime.telemetry import Metrics


def entry(key: str, **more: Any) -> dict[str, Any]:
    return {"name": f"owner-of-{key}", "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


def yaml_of(*keys: str) -> str:
    return yaml.safe_dump([entry(key) for key in keys])


class Gateway:
    """What of a gateway has to do with keys."""

    def __init__(self, path: Path) -> None:
        auth = {"mode": "required", "keys": [entry("fixed")], "keys_file": str(path)}
        settings = parse_settings(
            {"gateway": {"auth": auth}, "models": {"small": {"source": "s"}}}, {}
        )
        self.metrics = Metrics("gateway")
        self.authenticator = Authenticator(settings.gateway, self.metrics)
        self.keys = ApiKeys(settings, self.authenticator, self.metrics)

    def lets_in(self, key: str) -> bool:
        try:
            return self.authenticator.tenant(f"Bearer {key}").name == f"owner-of-{key}"
        except ServiceError:
            return False

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"what": "api_keys", **labels})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml_of("one"))
    return path


@pytest.fixture
async def gateway(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setattr(file_watch, "INTERVAL_S", 0.01)
    gateway = Gateway(path)
    gateway.keys.start()
    yield gateway
    await gateway.keys.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_keys_come_and_go_with_the_file_and_those_of_the_settings_stay(
    gateway: Gateway, path: Path
) -> None:
    assert gateway.lets_in("one")
    path.write_text(yaml_of("one", "two"))
    await until(lambda: gateway.lets_in("two"))
    assert gateway.lets_in("one")
    path.write_text("[]")
    await until(lambda: not gateway.lets_in("one"))
    assert not gateway.lets_in("two")
    assert gateway.lets_in("fixed")
    assert [key.name for key in gateway.keys.settings.gateway.auth.keys] == ["owner-of-fixed"]
    assert gateway.metric("meshserve_file_reloads_total", outcome="taken") == 2


async def test_a_folder_whose_link_is_swapped_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_watch, "INTERVAL_S", 0.01)
    for version, key in (("first", "one"), ("second", "two")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.yaml").write_text(yaml_of(key))
    (tmp_path / "..data").symlink_to("first")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    gateway = Gateway(tmp_path / "keys.yaml")
    gateway.keys.start()
    (tmp_path / "..data_tmp").symlink_to("second")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    await until(lambda: gateway.lets_in("two"))
    assert not gateway.lets_in("one")
    await gateway.keys.stop()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a list of keys"),
        ("{name: a}", "expected a list of keys"),
        ("- {name: a, sha256: 'unfinished", "not valid YAML"),
        ("- {name: a, sha265: x}", "0.sha265: unknown key; did you mean 'sha256'?"),
        (yaml_of("two", "fixed"), "have the same key"),
        (yaml_of("two", "two"), "have the same key"),
        (yaml.safe_dump([entry("two"), entry("b", models=["large"])]), "unknown model 'large'"),
        (yaml.safe_dump([entry("two"), {"name": "b", "sha256": "s3cret"}]), "1.sha256: "),
        (None, "cannot be read: No such file"),
    ],
)
async def test_a_broken_file_changes_nothing_and_is_told_of_once(
    gateway: Gateway,
    path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
    problem: str,
) -> None:
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    await until(lambda: gateway.metric("meshserve_files_refused") == 1)
    await asyncio.sleep(0.05)
    assert gateway.lets_in("one")
    assert not gateway.lets_in("two")
    (warning,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert problem in warning.getMessage()
    assert "s3cret" not in caplog.text
    assert gateway.metric("meshserve_file_reloads_total", outcome="refused") == 1

    path.write_text(yaml_of("three"))
    await until(lambda: gateway.lets_in("three"))
    assert gateway.metric("meshserve_files_refused") == 0


async def test_a_file_that_is_broken_at_the_start_keeps_the_gateway_from_starting(
    path: Path,
) -> None:
    path.write_text("- {name: a}")
    with pytest.raises(StartupError, match=r"0.sha256: required and missing"):
        Gateway(path)
