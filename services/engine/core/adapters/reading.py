"""Reads an adapter from a directory, as PEFT writes it: adapter_config.json and
adapter_model.safetensors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from services.engine.core.adapters.config import AdapterConfig, read_adapter_config
from services.engine.core.adapters.targets import Target, Targets
from services.engine.core.errors import AdapterLimitError
from services.engine.core.kernels import AdapterParts, LowRankPart
from services.engine.core.weights.mapped_tensors import as_tensor
from services.engine.core.weights.tensor_files import FLOAT_TYPES, TORCH_TYPES
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.safetensors_file import SafetensorsFile

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight", re.ASCII)


# What reading takes of a parameter: as float32, and in the form that steps read.
_BYTES_EACH = 8


def read_adapter(
    directory: Path, targets: Targets, *, max_rank: int, free_bytes: int | None = None
) -> AdapterParts:
    """Read an adapter for a model with these targets. The matrices are float32.

    Raises:
        ModelFileError: it is missing, damaged, or not an adapter of this model.
        AdapterLimitError: a rank is larger than `max_rank`, or it takes more than `free_bytes`.
    """
    config = read_adapter_config(directory)
    path = directory / WEIGHTS_NAME
    pickled = path.with_suffix(".bin")
    if not path.exists() and pickled.exists():
        problem = "holds pickled Python objects, which are not loaded; save it as safetensors"
        raise ModelFileError(pickled, problem)
    with contextlib.closing(SafetensorsFile(path)) as file:
        needed = _BYTES_EACH * sum(each.num_elements for each in file.tensors.values())
        if free_bytes is not None and needed > free_bytes:
            raise AdapterLimitError("", f"it takes {needed} bytes, and {free_bytes} are free")
        return _Reader(file, config, targets, max_rank).read()


class _Reader:
    def __init__(
        self, file: SafetensorsFile, config: AdapterConfig, targets: Targets, max_rank: int
    ) -> None:
        self._file = file
        self._config = config
        self._targets = targets
        self._max_rank = max_rank

    def read(self) -> AdapterParts:
        modules: dict[str, dict[str, str]] = {}
        for source in self._file.tensors:
            module, kind = self._split(source)
            sources = modules.setdefault(module, {})
            if kind in sources:
                raise self._error(source, f"is there as {sources[kind]!r} too")
            sources[kind] = source
        if not modules:
            raise ModelFileError(self._file.path, "holds no tensors")
        found: dict[str, list[LowRankPart]] = {}
        for module, sources in modules.items():
            target = self._target(module, sources)
            part = self._part(module, sources, target)
            others = found.setdefault(target.module, [])
            end = part.first + target.outputs
            if any(part.first < each.first + len(each.up) and each.first < end for each in others):
                source = next(iter(sources.values()))
                raise self._error(source, "changes what another tensor changes as well")
            others.append(part)
        return {module: tuple(parts) for module, parts in found.items()}

    def _split(self, source: str) -> tuple[str, str]:
        matched = _MATRIX.fullmatch(source)
        if matched is None:
            raise self._error(source, "is not supported: adapters are pairs lora_A and lora_B")
        return matched[1].removeprefix(_PREFIX), matched[2]

    def _target(self, module: str, sources: Mapping[str, str]) -> Target:
        target = self._targets.find(module)
        if target is None:
            problem = "is of no projection of this model's attention or feed-forward layers"
            raise self._error(next(iter(sources.values())), problem)
        return target

    def _part(self, module: str, sources: Mapping[str, str], target: Target) -> LowRankPart:
        for kind, other in (("A", "B"), ("B", "A")):
            if kind not in sources:
                raise self._error(sources[other], f"has no lora_{kind} beside it")
        rank = self._config.rank_of(module)
        self._check(sources["A"], (rank, target.inputs))
        self._check(sources["B"], (target.outputs, rank))
        if rank > self._max_rank:
            raise AdapterLimitError(
                "max_adapter_rank", f"{module} has rank {rank}, of at most {self._max_rank}"
            )
        up = self._values(sources["B"]) * self._config.scale_of(module, rank)
        if not up.isfinite().all():
            raise self._error(sources["B"], "is not finite when scaled")
        return LowRankPart(self._values(sources["A"]), up, target.first)

    def _check(self, source: str, shape: tuple[int, int]) -> None:
        stored = self._file.tensors[source]
        if stored.dtype not in FLOAT_TYPES:
            problem = f"is stored as {stored.dtype}, only {', '.join(FLOAT_TYPES)} can be read"
            raise self._error(source, problem)
        if stored.shape != shape:
            raise self._error(source, f"has shape {list(stored.shape)}, not {list(shape)}")

    def _values(self, source: str) -> Tensor:
        stored = self._file.tensors[source]
        raw = as_tensor(self._file.tensor_bytes(source)).view(TORCH_TYPES[stored.dtype])
        values = raw.view(stored.shape).to(torch.float32, copy=True)
        if not values.isfinite().all():
            raise self._error(source, "holds a value that is no finite number")
        return values

    def _error(self, source: str, problem: str) -> ModelFileError:
        offset = self._file.tensors[source].offset
        return ModelFileError(self._file.path, problem, what=f"tensor {source!r}", offset=offset)
