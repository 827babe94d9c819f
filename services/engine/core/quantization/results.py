"""A quantised model beside the ways that its source can be kept: memory, perplexity and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.models.loader import open_model
from services.engine.core.models.precision import WeightChoice
from services.engine.core.quantization.measuring import Measured, Speed, measure, measure_speed
from services.engine.core.quantization.sensitivity import Progress

# Speeds are measured in turns, so that all have their share of what else the machine does.
_ROUNDS = 2


def measure_results(
    path: Path, directory: Path, windows: Sequence[Sequence[int]], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Return what is reported of each case; those that are not to be had here are left out.

    path: the source; directory: what was made of it. Of a speed the best round counts, and
    `speed_spread` says by how much the slowest was slower, as a share: where that is more than two
    cases differ by, nothing is known of which is faster.
    """
    cases: dict[str, tuple[Path, WeightChoice]] = {
        "bfloat16": (path, "bfloat16"),
        "as it was": (path, "auto"),
        "int8, rounded at loading": (path, "int8"),
        "int4, rounded at loading": (path, "int4"),
        "quantised": (directory, "auto"),
    }
    found: dict[str, Measured] = {}
    speeds: dict[str, list[Speed]] = {}
    steps = _ROUNDS * len(cases)
    for done in range(steps):
        progress("measuring what came of it", done, steps)
        name = list(cases)[done % len(cases)]
        place, weights = cases[name]
        if done < len(cases):
            try:
                found[name] = measure(open_model(place), weights, windows)
            except UnsupportedModelError:
                continue
            speeds[name] = [found[name].speed]
        elif name in found:
            speeds[name].append(measure_speed(open_model(place), weights, windows[0]))
    progress("measuring what came of it", steps, steps)
    reference = found["bfloat16"].perplexity
    return {
        name: {
            "bytes": each.total_bytes,
            "by_format": each.weight_bytes,
            "perplexity": _finite(each.perplexity),
            "perplexity_ratio": _finite(each.perplexity / reference),
            **_speed(speeds[name]),
        }
        for name, each in found.items()
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _speed(rounds: list[Speed]) -> dict[str, float]:
    prompts = [each.prompt_tokens_per_s for each in rounds]
    decodes = [each.decode_tokens_per_s for each in rounds]
    return {
        "prompt_tokens_per_s": max(prompts),
        "decode_tokens_per_s": max(decodes),
        "speed_spread": max(1 - min(each) / max(each) for each in (prompts, decodes)),
    }
