"""Each model that runs on this machine gets an engine process of its own."""

from __future__ import annotations

from typing import Any

from meshserve.supervisor.engines import LocalEngine, local_engines, target_environment
from services.runtime.settings import Settings, parse_settings

SMALL, LARGE, FAR = (
    {"source": "smollm2-135m"},
    {"source": "/models/large", "aliases": ["big"], "price": {"prompt": 1, "completion": 2}},
    {"source": "/models/far", "engine_target": "dns:///elsewhere:50053"},
)


def settings_of(models: dict[str, Any], **engine: Any) -> Settings:
    return parse_settings({"models": models, "engine": engine}, {})


def as_seen_by(settings: Settings, engine: LocalEngine | None = None) -> Settings:
    """The settings that a service reads, or an engine."""
    environment = target_environment(settings) | (engine.environment if engine else {})
    document = {"models": {"another": {"source": "another"}}}
    return parse_settings(document, environment)


def test_one_model_needs_nothing_said() -> None:
    settings = settings_of({"small": SMALL, "far": FAR})
    assert [each.name for each in local_engines(settings)] == ["engine"]
    assert target_environment(settings) == {}


def test_a_further_model_has_an_engine_where_the_gateway_looks_for_it() -> None:
    settings = settings_of({"small": SMALL, "org/large model": LARGE, "far": FAR})
    first, second = local_engines(settings)
    assert (first.name, first.model) == ("engine", "small")
    assert (second.name, second.model) == ("engine-org-large-model", "org/large model")
    seen = as_seen_by(settings)
    assert seen.default_model == "small"
    assert seen.models["org/large model"].engine_target == "dns:///127.0.0.1:50063"
    assert seen.models["org/large model"].aliases == ("big",)
    assert seen.models["org/large model"].price == settings.models["org/large model"].price
    assert seen.models["far"] == settings.models["far"]
    own = as_seen_by(settings, second)
    assert own.engine_model == "org/large model"
    assert (own.engine.listen, own.engine.metrics_listen) == ("127.0.0.1:50063", "127.0.0.1:9463")


def test_the_model_of_the_settings_stays_where_the_settings_say() -> None:
    settings = settings_of(
        {"small": SMALL, "large": LARGE}, model="large", listen="[::1]:7000", metrics_listen=None
    )
    first, second = local_engines(settings)
    assert (first.model, first.section.listen) == ("large", "[::1]:7000")
    assert (second.model, second.section.listen) == ("small", "[::1]:7010")
    assert as_seen_by(settings, second).engine.metrics_listen is None
    assert as_seen_by(settings).models["large"].engine_target is None


def test_sockets_get_names_of_their_own() -> None:
    settings = settings_of({"small": SMALL, "large": LARGE}, listen="unix:/run/engine.sock")
    assert local_engines(settings)[1].section.listen == "unix:/run/engine.sock-1"
    assert as_seen_by(settings).models["large"].engine_target == "unix:/run/engine.sock-1"


def test_engines_that_are_elsewhere_are_not_started_here() -> None:
    settings = settings_of({"small": SMALL, "large": LARGE}, target="dns:///engines:50053")
    assert [each.name for each in local_engines(settings)] == ["engine"]
