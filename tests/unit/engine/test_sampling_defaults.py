"""What an engine is told of sampling for requests that leave it open."""

from __future__ import annotations

import pytest

from services.engine import service
from services.runtime.settings import Settings, parse_settings


@pytest.fixture(autouse=True)
def _any_model_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "locate", lambda source, cache: f"/models/{source}.gguf")


def defaults(**model: object) -> dict[str, float]:
    settings: Settings = parse_settings({"models": {"m": model}}, {})
    return service.core_settings(settings, "m").default_sampling


def test_a_catalogue_model_is_sampled_as_the_catalogue_recommends() -> None:
    assert defaults(source="smollm2-135m") == {
        "temperature": 0.2,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
    }


def test_the_settings_have_the_last_word() -> None:
    assert defaults(source="smollm2-135m", sampling={"temperature": 0, "top_k": 5}) == {
        "temperature": 0.0,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "top_k": 5,
    }


def test_other_models_keep_their_own_generation_configuration() -> None:
    assert defaults(source="/models/mine") == {}
