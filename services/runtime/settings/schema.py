"""The whole file: its sections, and what must hold between them.

docs/configuration.md is generated from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from services.runtime.settings.gateway import ApiKeySettings, GatewaySettings
from services.runtime.settings.models import DEMO_MODEL, ModelSettings
from services.runtime.settings.section import Section, ServerSettings
from services.runtime.settings.services import (
    CacheSettings,
    EngineSettings,
    SafetySettings,
    TelemetrySettings,
    TokenizerSettings,
    ValkeySettings,
)

# No mark that stands between a model and its adapter, or between an adapter and its revision.
ADAPTER_NAME = r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}"
SERVICE_NAMES = ("gateway", "tokenizer", "engine", "cache", "safety")


def _default_models() -> dict[str, ModelSettings]:
    return {DEMO_MODEL: ModelSettings.model_validate({"source": DEMO_MODEL})}


class Settings(Section):
    """The whole file."""

    models: dict[str, ModelSettings] = Field(
        default_factory=_default_models, description="Models by name; the first is the default."
    )
    model_cache: Path | None = Field(
        None,
        description="Where pulled models are kept. Default: `$MESHSERVE_CACHE`, or `meshserve` in "
        "the user's cache directory.",
    )
    gateway: GatewaySettings = Field(default_factory=lambda: GatewaySettings())
    tokenizer: TokenizerSettings = Field(default_factory=lambda: TokenizerSettings())
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings())
    cache: CacheSettings = Field(default_factory=lambda: CacheSettings())
    safety: SafetySettings = Field(default_factory=lambda: SafetySettings())
    valkey: ValkeySettings = Field(default_factory=lambda: ValkeySettings())
    telemetry: TelemetrySettings = Field(default_factory=lambda: TelemetrySettings())

    @model_validator(mode="after")
    def _models_are_consistent(self) -> Self:
        if not self.models:
            raise ValueError("models: at least one model is needed")
        owner: dict[str, str] = {}
        for name, model in self.models.items():
            # Requests may name an adapter in the place of a model.
            for alias in (name, *model.aliases, *model.adapters):
                if alias in owner:
                    raise ValueError(
                        f"models: the name {alias!r} is given to {owner[alias]!r} and to {name!r}"
                    )
                owner[alias] = name
            for adapter in model.adapters:
                if not re.fullmatch(ADAPTER_NAME, adapter):
                    raise ValueError(
                        f"models.{name}.adapters: {adapter!r} is not 1 to 128 letters, digits and "
                        "any of . _ - /"
                    )
        if self.engine.model is not None and self.engine.model not in self.models:
            raise ValueError(f"engine.model: {self.engine.model!r} is not among models")
        self.check_keys(self.gateway.auth.keys)
        return self

    def check_keys(self, keys: Sequence[ApiKeySettings]) -> None:
        """Raises ValueError where API keys contradict one another or the models."""
        models = {alias for name, model in self.models.items() for alias in (name, *model.aliases)}
        digests: dict[str, str] = {}
        for key in keys:
            if key.sha256 in digests:
                raise ValueError(
                    f"gateway.auth.keys: {digests[key.sha256]!r} and {key.name!r} have the same key"
                )
            digests[key.sha256] = key.name
            for model_name in key.models:
                # Of an adapter, `MODEL:ADAPTER`, only the model is known here.
                if model_name not in models and not any(
                    model_name.startswith(f"{name}:") for name in models
                ):
                    raise ValueError(
                        f"gateway.auth.keys: key {key.name!r} names the unknown model "
                        f"{model_name!r}"
                    )

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.models))

    def models_at(self, target: str) -> dict[str, ModelSettings]:
        """The models whose engines are at a target, by name."""
        default = self.engine.effective_target
        return {
            name: model
            for name, model in self.models.items()
            if (model.engine_target or default) == target
        }

    @property
    def engine_models(self) -> tuple[str, ...]:
        """The models that an engine process hosts, by name."""
        if self.engine.model is not None:
            return (self.engine.model,)
        return tuple(self.models_at(self.engine.effective_target)) or (self.default_model,)

    def server(self, service: str) -> ServerSettings:
        """The section of a service by its name."""
        section = getattr(self, service)
        assert isinstance(section, ServerSettings)
        return section
