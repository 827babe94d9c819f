"""The engines of a mesh on one machine: one process for each model that runs here."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from services.runtime.settings import EngineSettings, Settings
from services.runtime.settings.addresses import UNIX_SOCKET, split_address

# From the ports of one engine to those of the next: clear of the other services.
PORT_STEP = 10


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """One engine process: its name among the processes, the model that it runs and its section of
    the settings."""

    name: str
    model: str
    section: EngineSettings

    @property
    def environment(self) -> dict[str, str]:
        """The settings that tell it from the others."""
        return {
            "MESHSERVE_ENGINE__MODEL": yaml.safe_dump(self.model),
            "MESHSERVE_ENGINE__LISTEN": yaml.safe_dump(self.section.listen),
            "MESHSERVE_ENGINE__METRICS_LISTEN": yaml.safe_dump(self.section.metrics_listen),
        }


def local_engines(settings: Settings) -> list[LocalEngine]:
    """The engines that run here: that of `engine.model` at `engine.listen`, and others, each some
    ports above the one before, for the models that no target places elsewhere."""
    engine = settings.engine
    engines = [LocalEngine("engine", settings.engine_model, engine)]
    if engine.target is not None:
        return engines
    for name, model in settings.models.items():
        if name != settings.engine_model and model.engine_target is None:
            above, metrics = PORT_STEP * len(engines), engine.metrics_listen
            section = engine.model_copy(
                update={
                    "model": name,
                    "listen": _above(engine.listen, above),
                    "metrics_listen": metrics and _above(metrics, above),
                }
            )
            engines.append(LocalEngine(f"engine-{_file_name(name)}", name, section))
    return engines


def target_environment(settings: Settings) -> dict[str, str]:
    """The setting `models` that tells every service where the engines of the models are."""
    others = local_engines(settings)[1:]
    if not others:
        return {}
    targets = {engine.model: engine.section.effective_target for engine in others}
    models = {
        name: model.model_dump(mode="json", exclude_unset=True)
        | ({"engine_target": targets[name]} if name in targets else {})
        for name, model in settings.models.items()
    }
    return {"MESHSERVE_MODELS": yaml.safe_dump(models, sort_keys=False)}


def _above(address: str, ports: int) -> str:
    if address.startswith(UNIX_SOCKET):
        return f"{address}-{ports // PORT_STEP}"
    host, port = split_address(address)
    return f"[{host}]:{port + ports}" if ":" in host else f"{host}:{port + ports}"


def _file_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model)
