"""Which way of quantising a checkpoint's config.json names: `quantization_config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from services.engine.core.weights.awq import AWQ
from services.engine.core.weights.compressed_tensors import read_compressed_tensors
from services.engine.core.weights.fp8 import read_fbgemm_fp8, read_fp8
from services.engine.core.weights.gptq import read_gptq
from services.engine.core.weights.stored_floats import StoredFloats
from services.engine.core.weights.stored_linear import StoredLinear
from services.engine.core.weights.tensor_files import TensorEntry
from services.runtime.modelfiles.fields import Fields, read_json


class Scheme(Protocol):
    """How a quantised projection is stored: as several tensors, each of a kind.

    A tensor MODULE.KIND belongs to the projection MODULE.
    """

    def __str__(self) -> str:
        """What it is called, for people."""

    def owns(self, kind: str, entry: TensorEntry) -> bool:
        """Whether a tensor is part of a quantised projection."""

    def shape(self, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        """Return outputs and inputs of a projection.

        parts: by kind. Raises ValueError where one is missing or they do not fit each other.
        """

    def read(self, parts: Mapping[str, Tensor]) -> StoredLinear | StoredFloats:
        """Return a projection whose `shape` has been checked; raises ValueError for bad numbers."""


def read_scheme(directory: Path) -> Scheme | None:
    """Return how the projections of a model are quantised, None where they are not.

    Raises ModelFileError, with the field by name, for a way that cannot be read.
    """
    path = directory / "config.json"
    if not path.exists():
        return None
    config = Fields(path, read_json(path)).table("quantization_config")
    if config is None:
        return None
    method = config.text("quant_method")
    if method not in _READERS:
        known = ", ".join(_READERS)
        raise config.error("quant_method", f"{method!r} is not supported, only {known} are")
    return _READERS[method](config)


_READERS: dict[str, Callable[[Fields], Scheme]] = {
    "awq": AWQ.from_config,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm_fp8,
}
