"""What `meshserve up --model` means for the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshserve.cli.exits import CommandError
from meshserve.cli.services import model_environment, trace_environment
from services.runtime.settings import parse_settings


@pytest.mark.parametrize("model", ["smollm2-135m", "org/name", "org/name@main"])
def test_a_name_becomes_the_only_model(model: str) -> None:
    document = {
        "models": {"other": {"source": "smollm2-135m"}},
        "engine": {"model": "other", "threads": 1},
    }
    settings = parse_settings(document, model_environment(model))
    assert [(name, entry.source) for name, entry in settings.models.items()] == [(model, model)]
    assert settings.engine_models == (model,)
    assert settings.engine.threads == 1


def test_traces_that_go_elsewhere_are_not_taken_from_there() -> None:
    settings = parse_settings({"telemetry": {"otlp_endpoint": "http://jaeger:4317"}}, {})
    with pytest.raises(CommandError, match="traces go to http://jaeger:4317 already"):
        trace_environment(settings)


def test_a_path_is_named_after_its_file_and_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny: model.gguf").write_text("")
    monkeypatch.chdir(tmp_path)
    settings = parse_settings({}, model_environment("./tiny: model.gguf"))
    assert settings.default_model == "tiny: model"
    assert settings.models["tiny: model"].source == str(tmp_path / "tiny: model.gguf")
