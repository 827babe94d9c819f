"""The adapters of an engine: loaded and unloaded while it computes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from services.engine.core.adapters.identity import LoadedAdapter
from services.engine.core.adapters.reading import read_adapter
from services.engine.core.adapters.targets import Targets
from services.engine.core.errors import (
    AdapterExistsError,
    AdapterLimitError,
    AdapterNotFoundError,
    EngineError,
    StartupError,
)
from services.engine.core.kernels import AdapterParts
from services.engine.core.memory import free_memory_bytes
from services.engine.core.messages import AdapterChanged, LoadAdapter, UnloadAdapter
from services.runtime.modelfiles import ModelFileError

logger = logging.getLogger(__name__)


class PreparedAdapter(Protocol):
    """An adapter in the form that steps read."""

    num_bytes: int


class AdaptedModel(Protocol):
    """A model whose batches name the adapters of their sequences by slots."""

    def prepare_adapter(self, parts: AdapterParts, /) -> PreparedAdapter:
        """Prepare an adapter; may be done beside steps."""

    def set_adapter(self, slot: int, adapter: Any, /) -> None:
        """Keep it, or None: forget it. Between steps, and done at once."""


@dataclass(frozen=True, slots=True)
class _Loading:
    command: LoadAdapter
    slot: int
    done: Future[tuple[Any, int]]


class Adapters:
    """Those of one model, by name.

    Files are read on a thread of its own while steps are computed; between steps an adapter is
    merely put in its place, or taken out once no sequence goes through it.
    """

    def __init__(
        self,
        model: AdaptedModel,
        targets: Targets,
        *,
        max_adapters: int,
        max_rank: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._targets = targets
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._device = device
        self._loaded: dict[str, LoadedAdapter] = {}
        self._loading: dict[str, _Loading] = {}
        self._leaving: list[tuple[UnloadAdapter, LoadedAdapter]] = []
        self._changes: list[AdapterChanged] = []
        self._free_slots = list(range(max_adapters - 1, -1, -1))
        self._generations = itertools.count(1)
        self._reader: ThreadPoolExecutor | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the loaded adapters."""
        return {name: each.num_bytes for name, each in self._loaded.items()}

    @property
    def is_changing(self) -> bool:
        """Whether there is something to `settle`, now or soon."""
        return bool(self._loading or self._leaving or self._changes)

    def find(self, name: str, *, continuing: bool = False) -> LoadedAdapter:
        """The adapter of this name. continuing: for what goes through it already.

        Raises:
            AdapterNotFoundError: there is none, or it takes nothing new.
        """
        adapter = self._loaded.get(name)
        if adapter is None or (adapter.leaving and not continuing):
            raise AdapterNotFoundError(f"no adapter {name!r} is loaded")
        return adapter

    def load_first(self, paths: Mapping[str, str], *, may_fail: bool) -> None:
        """Load adapters before the first step.

        Raises:
            StartupError: one cannot be loaded, unless they may fail.
        """
        for name, path in paths.items():
            try:
                prepared, num_bytes = self._read(Path(path))
            except (ModelFileError, EngineError) as error:
                if not may_fail:
                    raise StartupError(f"the adapter {name!r} cannot be loaded: {error}") from None
                logger.error("the adapter %r is left out: %s", name, error)
                continue
            self._put(name, Path(path), self._free_slots.pop(), prepared, num_bytes)

    def load(self, command: LoadAdapter) -> None:
        """Begin to load an adapter. One that is there already, from the same place, is loaded."""
        known = self._loaded.get(command.name)
        if known is not None and not known.leaving and str(known.path) == command.path:
            self._changes.append(AdapterChanged(command.number, known.num_bytes))
            return
        try:
            if known is not None or command.name in self._loading:
                raise AdapterExistsError(f"another adapter {command.name!r} is there already")
            if not self._free_slots:
                raise AdapterLimitError(
                    "max_adapters", f"{self._max_adapters} adapters are loaded already"
                )
        except EngineError as error:
            self._refuse(command.number, error)
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        done = self._reader.submit(self._read, Path(command.path))
        self._loading[command.name] = _Loading(command, self._free_slots.pop(), done)

    def unload(self, command: UnloadAdapter) -> None:
        """Take no sequences for an adapter from here on, and unload it once it has none."""
        try:
            adapter = self.find(command.name)
        except AdapterNotFoundError as error:
            self._refuse(command.number, error)
            return
        adapter.leaving = True
        self._leaving.append((command, adapter))

    def settle(self, is_used: Callable[[LoadedAdapter], bool]) -> list[AdapterChanged]:
        """Put in place what has been read, and take out what nobody uses; returns what came of
        commands since the last call."""
        for name, loading in [*self._loading.items()]:
            if loading.done.done():
                del self._loading[name]
                self._finish(loading)
        leaving, self._leaving = self._leaving, []
        for command, adapter in leaving:
            if is_used(adapter):
                self._leaving.append((command, adapter))
                continue
            self._model.set_adapter(adapter.slot, None)
            del self._loaded[adapter.name]
            self._free_slots.append(adapter.slot)
            self._changes.append(AdapterChanged(command.number))
            logger.info("unloaded the adapter %r", adapter.name)
        changes, self._changes = self._changes, []
        return changes

    def _finish(self, loading: _Loading) -> None:
        command = loading.command
        try:
            prepared, num_bytes = loading.done.result()
        except Exception as error:
            self._free_slots.append(loading.slot)
            if not isinstance(error, ModelFileError | EngineError):
                logger.exception("the adapter %r cannot be loaded", command.name)
            self._refuse(command.number, error)
            return
        self._put(command.name, Path(command.path), loading.slot, prepared, num_bytes)
        self._changes.append(AdapterChanged(command.number, num_bytes))

    def _put(self, name: str, path: Path, slot: int, prepared: Any, num_bytes: int) -> None:
        self._model.set_adapter(slot, prepared)
        self._loaded[name] = LoadedAdapter(name, path, slot, next(self._generations), num_bytes)
        logger.info("loaded the adapter %r from %s: %.1f MiB", name, path, num_bytes / 2**20)

    def _read(self, path: Path) -> tuple[Any, int]:
        """An adapter as the model takes it, and its bytes."""
        try:
            with torch.inference_mode():
                weights = read_adapter(
                    path,
                    self._targets,
                    max_rank=self._max_rank,
                    free_bytes=free_memory_bytes(self._device),
                )
                prepared = self._model.prepare_adapter(weights)
                return prepared, prepared.num_bytes
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise AdapterLimitError("", f"it does not fit on {self._device}: {error}") from None

    def _refuse(self, number: int, error: Exception) -> None:
        setting = error.setting if isinstance(error, AdapterLimitError) else ""
        self._changes.append(AdapterChanged(number, 0, type(error).__name__, str(error), setting))
