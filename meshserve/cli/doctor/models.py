"""Whether the models of the settings are here, can be run and have room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from meshserve.cli.doctor.findings import Finding, ok, problem, warning
from services.engine.core.memory import free_memory_bytes
from services.engine.core.models import read_config
from services.runtime.modelfiles import ModelFileError, ModelStoreError, check_source, locate
from services.runtime.modelfiles.description import describe
from services.runtime.settings import Settings

GIB = 2**30


def models(settings: Settings, cache_dir: Path, *, starting: bool) -> Iterator[Finding]:
    """Each model of the settings; `starting`: none of them is in memory yet."""
    sources = {f"the model {name!r}": model.source for name, model in settings.models.items()}
    if settings.engine.speculation.draft_model is not None:
        sources["the draft model"] = settings.engine.speculation.draft_model
    for what, source in sources.items():
        yield _model(what, source, cache_dir, starting=starting)


def _model(what: str, source: str, cache_dir: Path, *, starting: bool) -> Finding:
    try:
        check_source(source)
    except ModelStoreError as error:
        return problem(f"{what}: {error.problem}", error.way_out)
    try:
        path = locate(source, cache_dir)
    except ModelStoreError as error:
        return warning(f"{what} is not here yet: {error.problem}", error.way_out)
    try:
        described = describe(path)
        read_config(path)
    except ModelFileError as error:
        return problem(f"{what}: {error}", "pull the model again, or give another one")
    size, free = described.size_bytes, free_memory_bytes(torch.device("cpu"))
    text = f"{what} is a {described.architecture} of {described.num_parameters / 1e6:,.0f}M"
    text += f" parameters, {size / GIB:.2f} GiB of {described.dtype}"
    if starting and size > free and not torch.cuda.is_available():
        return problem(
            f"{text}; only {free / GIB:.1f} GiB of memory are free",
            "take a smaller or quantised model, or a machine with more memory",
        )
    return ok(text)
