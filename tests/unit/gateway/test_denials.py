"""Who is denied is counted by reason, wherever that is found out."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import pytest

from services.gateway.hosting.hosting import Hosting
from services.gateway.models import ModelDirectory
from services.gateway.stages.authenticate import Authenticator
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import Settings, parse_settings
from services.runtime.telemetry import Metrics

KEY = "acme-key"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("gateway")


@pytest.fixture
def settings() -> Settings:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    auth = {"mode": "required", "keys": [{"name": "acme", "sha256": digest, "models": ["small"]}]}
    models = {"small": {"source": "small"}, "large": {"source": "large"}}
    return parse_settings({"models": models, "gateway": {"auth": auth}}, {})


def denied(metrics: Metrics) -> dict[str, float]:
    return {
        sample.labels["reason"]: sample.value
        for family in metrics.registry.collect()
        if family.name == "meshserve_gateway_denials"
        for sample in family.samples
    }


def test_keys_and_permissions(metrics: Metrics, settings: Settings) -> None:
    authenticator = Authenticator(settings.gateway, metrics)
    for authorization in (None, "Bearer another", "Basic abc"):
        with pytest.raises(ServiceError):
            authenticator.tenant(authorization)
    assert authenticator.tenant(f"Bearer {KEY}").name == "acme"
    with pytest.raises(ServiceError):
        authenticator.operator(f"Bearer {KEY}")
    assert denied(metrics) == {
        Reason.API_KEY_MISSING: 1,
        Reason.API_KEY_INVALID: 2,
        Reason.NOT_AN_OPERATOR: 1,
    }


def test_models(metrics: Metrics, settings: Settings) -> None:
    peers, store = cast(Any, None), cast(Any, None)
    directory = ModelDirectory(settings, peers, Hosting(settings, peers, store, metrics), metrics)
    allowed = frozenset({"small"})
    assert directory.find_allowed("small", "", allowed) == ("small", "")
    with pytest.raises(ServiceError):
        directory.find_allowed("large", "", allowed)
    # A name that nobody has is a mistake, not a denial.
    with pytest.raises(ServiceError):
        directory.find_allowed("medium", "", allowed)
    assert denied(metrics) == {Reason.MODEL_NOT_ALLOWED: 1}
