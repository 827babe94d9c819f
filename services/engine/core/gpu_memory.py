"""How the memory of a GPU is divided: weights, activations, CUDA graphs, and the KV cache.

Several models of an engine are loaded one after another, each in a process that sees what is taken
and not by whom. Each divides what is left for caches by those that are yet to get theirs, itself
included, and keeps that, and memory for steps like its own, for them. So caches come out alike in
whatever order models are loaded, and one that comes back from sleep finds what it had.

The cache is sized last, by what the largest step was seen to take, so that no later step asks for
memory that is not there: what does not fit the cache waits or is preempted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from services.engine.core.errors import StartupError
from services.engine.core.settings import CoreSettings

# Of the card's memory, where nobody chose a share. What is left serves what cannot be seen ahead:
# the gaps between segments of torch's allocator, kernels that the driver loads at their first use.
DEFAULT_FRACTION = 0.9
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Readings:
    """Bytes at a moment: of the card as the driver says, and of them torch's in this process.

    `peak_bytes` is the most that torch has held since the peak was reset; what it holds includes
    what it keeps for later.
    """

    total_bytes: int
    free_bytes: int
    held_bytes: int
    peak_bytes: int

    @property
    def others_bytes(self) -> int:
        """What is in use and not torch's: the CUDA context, loaded kernels, other processes."""
        return max(0, self.total_bytes - self.free_bytes - self.held_bytes)


class MemoryReader(Protocol):
    """Reads the memory of one card."""

    def read(self) -> Readings:
        """Read it now."""

    def reset(self) -> None:
        """Give back what torch keeps for later, and begin a new peak."""


class CardMemory:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> Readings:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return Readings(
            total,
            free,
            torch.cuda.memory_reserved(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )

    def reset(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What the memory of a card goes to, in bytes.

    Attributes:
        total: of the card.
        others: what is not this engine's: the driver's, other processes'.
        weights: of the model, and of a draft model.
        activations: what the largest step takes beside them.
        graphs: kept for CUDA graphs.
        awaited: kept for other models that are yet to be loaded: weights, steps and caches.
        kv_cache: of this model.
    """

    total: int
    others: int
    weights: int
    activations: int
    graphs: int
    awaited: int
    kv_cache: int

    @property
    def left(self) -> int:
        """What nobody takes."""
        parts = self.others + self.weights + self.activations + self.graphs + self.awaited
        return self.total - parts - self.kv_cache

    def by_part(self) -> dict[str, int]:
        """The parts of the whole, in the order in which they are shown."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "CUDA graphs": self.graphs,
            "KV cache": self.kv_cache,
            "kept for other models": self.awaited,
            "driver and other processes": self.others,
            "left free": self.left,
        }

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {size / _GIB:.2f}" for name, size in self.by_part().items() if size
        )
        return f"{self.total / _GIB:.2f} GiB: {parts}"


def plan_memory(
    settings: CoreSettings,
    reader: MemoryReader,
    run_largest_step: Callable[[], None],
    *,
    graphs_bytes: int = 0,
) -> MemoryBudget:
    """Divide a card's memory once the weights are there, by running the largest step.

    run_largest_step: computes one, and keeps nothing. graphs_bytes: what CUDA graphs will take.

    Raises:
        StartupError: the largest step does not fit, or the cache does not that the settings ask
            for.
    """
    reader.reset()
    before = reader.read()
    try:
        run_largest_step()
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"a step of {settings.max_batch_tokens} tokens does not fit beside the weights "
            f"({before.held_bytes} bytes): lower max_batch_tokens or max_running_sequences; {error}"
        ) from None
    after = reader.read()
    reader.reset()
    return divide(settings, before, after, graphs_bytes)


def divide(
    settings: CoreSettings, before: Readings, after: Readings, graphs_bytes: int
) -> MemoryBudget:
    """Divide memory by what was read before the largest step and after it.

    Raises:
        StartupError: the cache that the settings ask for does not fit.
    """
    fraction = settings.kv_cache_memory_fraction or DEFAULT_FRACTION
    weights = before.held_bytes
    activations = max(0, after.peak_bytes - weights)
    # Kernels are loaded when they are first used: what others hold is read after the step.
    fixed = after.others_bytes + weights + activations + graphs_bytes
    awaited = settings.waiting_weights_bytes + settings.waiting_cache_bytes
    awaited += settings.waiting_models * (activations + graphs_bytes)
    room = max(0, int(after.total_bytes * fraction) - fixed - awaited)
    kv_cache = equal_part(settings, room)
    awaited += room // (1 + settings.waiting_caches) * settings.waiting_caches
    if settings.kv_cache_memory_bytes is not None:
        kv_cache = settings.kv_cache_memory_bytes
        if kv_cache > after.total_bytes - fixed:
            raise StartupError(
                f"a KV cache of {kv_cache} bytes does not fit: the card has {after.total_bytes}, "
                f"of which {after.others_bytes} are in use besides, and the model takes {weights} "
                f"for weights, {activations} for a step and {graphs_bytes} for CUDA graphs"
            )
    return MemoryBudget(
        after.total_bytes,
        after.others_bytes,
        weights,
        activations,
        graphs_bytes,
        max(0, min(awaited, after.total_bytes - fixed - kv_cache)),
        kv_cache,
    )


def equal_part(settings: CoreSettings, room_bytes: int) -> int:
    """What a model's cache gets of what is left for those that are yet to get theirs."""
    part = max(0, room_bytes) // (1 + settings.waiting_caches)
    limit = settings.kv_cache_limit_bytes
    return part if limit is None else min(part, limit)
