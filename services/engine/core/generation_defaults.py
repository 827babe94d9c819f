"""The sampling numbers that a model's authors ship with it (generation_config.json)."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

logger = logging.getLogger(__name__)

# Name -> the range in which we take it over, ends included.
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**32 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 10.0),
}


def read_generation_defaults(model_path: Path) -> dict[str, float]:
    """The defaults of a Hugging Face directory, by field name of SamplingParams.

    Empty for models that ship none, and where `do_sample` is off: its numbers then have no effect
    in the library the file is written for. A file or number that makes no sense is logged and left
    out; it is advice, and no reason to refuse the model.
    """
    path = model_path / "generation_config.json"
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is left aside: %s", path, error)
        return {}
    if not isinstance(fields, dict) or fields.get("do_sample") is not True:
        return {}
    defaults: dict[str, float] = {}
    for name, (low, high) in _RANGES.items():
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            logger.warning("%s: %s is left aside: %r is not a number", path, name, value)
        elif not low <= value <= high:
            logger.warning("%s: %s is left aside: %r is out of range", path, name, value)
        else:
            defaults[name] = value
    return defaults
