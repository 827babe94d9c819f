"""Whether the models of the settings are here, can be run and have room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from meshserve.cli.doctor.findings import Finding, ok, problem, warning
from meshserve.cli.model_report.report import sparse_attention_of
from services.engine.core.fitness import examine
from services.runtime.modelfiles import ModelFileError, ModelStoreError, check_source, locate
from services.runtime.modelfiles.description import describe
from services.runtime.settings import ModelSettings, Settings

GIB = 2**30
# A model that has no room for one sequence of so many tokens, or of its context, is of no use.
LEAST_TOKENS = 1024


def models(settings: Settings, cache_dir: Path, *, starting: bool) -> Iterator[Finding]:
    """Each model of the settings; `starting`: none of them is in memory yet."""
    found = {f"the model {name!r}": model for name, model in settings.models.items()}
    if settings.engine.speculation.draft_model is not None:
        found["the draft model"] = ModelSettings(source=settings.engine.speculation.draft_model)
    for what, model in found.items():
        yield _model(what, model, settings, cache_dir, starting=starting)


def _model(
    what: str, model: ModelSettings, settings: Settings, cache_dir: Path, *, starting: bool
) -> Finding:
    try:
        check_source(model.source)
    except ModelStoreError as error:
        return problem(f"{what}: {error.problem}", error.way_out)
    try:
        path = locate(model.source, cache_dir)
    except ModelStoreError as error:
        return warning(f"{what} is not here yet: {error.problem}", error.way_out)
    try:
        described = describe(path)
    except ModelFileError as error:
        return problem(f"{what}: {error}", "pull the model again, or give another one")
    fitness = examine(
        path,
        dtype=model.dtype,
        max_context_tokens=model.context_tokens,
        sparse_attention=sparse_attention_of(model),
        cache_dir=cache_dir,
        weights=(model.weights,),
    )
    if fitness.problem is not None:
        return problem(f"{what}: {fitness.problem}", "pull the model again, or give another one")
    footprint = fitness.footprints.get(model.weights)
    if footprint is None:
        return problem(
            f"{what} has weights in {model.weights}, which it cannot be kept in here",
            f"set models.NAME.weights to auto; `meshserve models show {model.source}` tells more",
        )
    size, free = footprint.total_weight_bytes, fitness.free_bytes
    text = f"{what} is a {described.architecture} of {(fitness.num_parameters or 0) / 1e6:,.0f}M"
    text += f" parameters, {size / GIB:.2f} GiB in memory, on "
    text += "the native kernels" if footprint.native else f"plain torch: {footprint.reason}"
    needed = size + fitness.kv_cache_bytes(
        model.weights,
        sequences=1,
        tokens=LEAST_TOKENS,
        kv_format=settings.engine.kv_cache_format,
    )
    if starting and needed > free:
        return problem(
            f"{text}; only {free / GIB:.1f} GiB of memory are free",
            "take a smaller or quantised model, or a machine with more memory",
        )
    return ok(text)
