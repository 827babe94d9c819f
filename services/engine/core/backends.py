"""What computes a model's steps: plain torch, or the native kernels of a CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch

from services.engine.core.errors import StartupError
from services.engine.core.kernels import Selection, cpu
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kv_cache import KVCache, kv_dtype
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.models.dtype import resolve_dtype
from services.engine.core.models.kept import KeptWeights, bytes_by_precision, multiplies_fp8
from services.engine.core.models.loader import OpenedModel
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from services.engine.core.processors import default_threads, own_processors
from services.engine.core.settings import CoreSettings

logger = logging.getLogger(__name__)

# Weights that take seconds to pack, on threads that are worth waking.
_LARGE_BYTES = 1 << 30


class Backend(Protocol):
    """A loaded model on its way to its KV cache."""

    dtype: str
    kernels: dict[str, str]  # op -> implementation, for those who ask what runs

    def bytes_per_block(self, block_size: int, groups: LayerGroups) -> int:
        """Bytes of one block of the KV cache."""

    def allocate(
        self, num_blocks: int, settings: CoreSettings, groups: LayerGroups
    ) -> tuple[Any, Any]:
        """Return the model, as the runner calls it, and its KV cache.

        Raises torch.OutOfMemoryError, RuntimeError or MemoryError where the cache does not fit.
        """


def load_backend(
    opened: OpenedModel,
    settings: CoreSettings,
    device: torch.device,
    selections: list[Selection],
    *,
    takes_adapters: bool = True,
) -> Backend:
    """Load the model for what serves it best on `device`, and log which that is and why.

    Its checkpoint is closed: the weights are in memory once, and not in a file's pages as well.

    Raises:
        StartupError: the settings ask for what is not to be had here, or memory is short.
        ModelFileError: a tensor cannot be read.
    """
    try:
        with contextlib.closing(opened.checkpoint):
            return _load_backend(
                opened, settings, device, selections, takes_adapters=takes_adapters
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(f"the weights do not fit on {device}: {error}") from None


def _load_backend(
    opened: OpenedModel,
    settings: CoreSettings,
    device: torch.device,
    selections: list[Selection],
    *,
    takes_adapters: bool,
) -> Backend:
    reason = _why_not_native(settings, device)
    if reason is None and settings.kv_cache_format == "fp8":
        raise StartupError("a KV cache in fp8 is for a GPU: on a CPU there is int8")
    if device.type == "cpu" and settings.weights in ("fp8", "w8a8"):
        raise StartupError(
            f"weights in {settings.weights} are for a GPU: on a CPU there are int8 and int4"
        )
    if reason is None:
        try:
            return _NativeBackend(opened, settings, selections, takes_adapters=takes_adapters)
        except UnsupportedModelError as error:
            reason = f"the native kernels do not serve this model: {error}"
    if device.type == "cpu" and settings.weights in ("int8", "int4"):
        # Torch would turn them into floats at every step.
        raise StartupError(
            f"weights in {settings.weights} need the native kernels of a CPU: {reason}"
        )
    return _TorchBackend(
        opened, settings, device, selections, reason, takes_adapters=takes_adapters
    )


def kept_weights(settings: CoreSettings, device: torch.device, dtype: torch.dtype) -> KeptWeights:
    """What a model on torch keeps its matrices in; "bfloat16" stands for `dtype`.

    Raises StartupError for what the card does not multiply.
    """
    weights = settings.weights
    if device.type == "cpu":
        return "bfloat16"
    if dtype == torch.float32 and weights != "bfloat16":
        if weights == "auto":
            return "bfloat16"
        raise StartupError(f"weights in {weights} go with a dtype of 16 bits, not with float32")
    if weights == "fp8" and not multiplies_fp8(device):
        capability = torch.cuda.get_device_capability(device)
        raise StartupError(
            f"weights in fp8 need compute capability 8.9, and {device} has "
            f"{capability[0]}.{capability[1]}: take w8a8 or int8"
        )
    return weights


def _why_not_native(settings: CoreSettings, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the device is {device}"
    if settings.dtype not in ("auto", "bfloat16"):
        return f"the dtype is {settings.dtype}"
    if settings.block_size % 16:
        return f"blocks of {settings.block_size} tokens are no multiple of 16"
    return cpu.why_not()


class _NativeBackend:
    def __init__(
        self,
        opened: OpenedModel,
        settings: CoreSettings,
        selections: list[Selection],
        *,
        takes_adapters: bool,
    ) -> None:
        library = cpu.active()
        assert library is not None
        self._config = opened.config
        self._format = KvFormat.INT8 if settings.kv_cache_format == "int8" else KvFormat.BF16
        num_threads = settings.threads or default_threads()
        processors = own_processors(num_threads)
        team = Team(library, num_threads, processors)
        with _threads_for_packing(opened.checkpoint.num_bytes):
            self._model = NativeModel(
                opened.skeleton,
                opened.checkpoint,
                team,
                cast(WeightChoice, settings.weights),
                max_adapters=settings.max_adapters if takes_adapters else 0,
                max_adapter_rank=settings.max_adapter_rank,
            )
        self.dtype = "bfloat16"
        stored = _described(self._model.weight_bytes, self._model.rounded, settings.weights)
        # All other ops are operations of the step.
        sampling = {each.op: each.implementation for each in selections if each.op == "sample"}
        self.kernels = {"step": f"{library.isa} ({stored})", **sampling}
        logger.info(
            "steps run natively: %s, weights %s, KV cache %s, %d threads%s",
            library.isa,
            stored,
            self._format.name.lower(),
            num_threads,
            "" if processors is None else f" on processors {processors}",
        )

    def bytes_per_block(self, block_size: int, groups: LayerGroups) -> int:
        config = self._config
        return PackedKVCache.bytes_per_block(
            groups.layers_per_block, block_size, config.kv_heads, config.head_dim, self._format
        )

    def allocate(
        self, num_blocks: int, settings: CoreSettings, groups: LayerGroups
    ) -> tuple[Any, Any]:
        config = self._config
        try:
            cache = PackedKVCache(
                config.num_layers,
                num_blocks,
                settings.block_size,
                config.kv_heads,
                config.head_dim,
                self._format,
                groups,
            )
        except ValueError as error:
            raise StartupError(str(error)) from None
        self._model.bind(cache, max_batch_tokens=settings.max_batch_tokens)
        # torch has nothing left to do that is worth waking a second pool of threads for.
        torch.set_num_threads(1)
        return self._model, cache


def _described(weight_bytes: Mapping[str, int], rounded: Mapping[str, int], weights: str) -> str:
    """What weights take, and which of them a file has in more bits."""
    stored = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in weight_bytes.items())
    if rounded and weights == "auto":
        kinds = ", ".join(f"{count} of {kind}" for kind, count in rounded.items())
        stored += f"; rounded to 8 bits: {kinds}"
    return stored


@contextlib.contextmanager
def _threads_for_packing(num_bytes: int) -> Iterator[None]:
    """Packing a small model is many short operations of torch: waking a pool of threads for each
    costs more than it saves, above all while other services start on the same processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if num_bytes >= _LARGE_BYTES else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _TorchBackend:
    def __init__(
        self,
        opened: OpenedModel,
        settings: CoreSettings,
        device: torch.device,
        selections: list[Selection],
        why_torch: str,
        *,
        takes_adapters: bool,
    ) -> None:
        try:
            self._dtype = resolve_dtype(settings.dtype, device)
        except ValueError as error:
            raise StartupError(str(error)) from None
        self._device = device
        self._config = opened.config
        self._kv_dtype = kv_dtype(settings.kv_cache_format, self._dtype)
        weights = kept_weights(settings, device, self._dtype)
        self._model, rounded = opened.load_kept(
            weights, self._dtype, device, multiplies_fp8=multiplies_fp8(device)
        )
        if takes_adapters and settings.max_adapters:
            self._model.take_adapters(
                max_adapters=settings.max_adapters, max_rank=settings.max_adapter_rank
            )
        self.dtype = str(self._dtype).removeprefix("torch.")
        stored = _described(bytes_by_precision(self._model), rounded, weights)
        self.kernels = {selection.op: selection.implementation for selection in selections}
        self.kernels["weights"] = stored
        logger.info("steps run on torch: %s; weights %s", why_torch, stored)

    def bytes_per_block(self, block_size: int, groups: LayerGroups) -> int:
        config = self._config
        return KVCache.bytes_per_block(
            groups.layers_per_block, block_size, config.kv_heads, config.head_dim, self._kv_dtype
        )

    def allocate(
        self, num_blocks: int, settings: CoreSettings, groups: LayerGroups
    ) -> tuple[Any, Any]:
        config = self._config
        cache = KVCache(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=self._kv_dtype,
            device=self._device,
            groups=groups,
        )
        return self._model, cache
