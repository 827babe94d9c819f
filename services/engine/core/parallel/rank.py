"""What every rank does to become part of an engine: it opens the model, loads its shard, makes its
KV cache."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import torch

from services.engine.core.backends import kept_weights
from services.engine.core.batch import CapturedShape
from services.engine.core.errors import StartupError
from services.engine.core.gpu_memory import CardMemory, MemoryReader, Readings, divide
from services.engine.core.kernels import cpu, cuda, installed, triton
from services.engine.core.kv_cache import KVCache, kv_dtype
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.memory import free_memory_bytes
from services.engine.core.models.dtype import resolve_dtype
from services.engine.core.models.kept import bytes_by_precision
from services.engine.core.models.loader import OpenedModel, build_skeleton
from services.engine.core.parallel.layout import Layout, Place, check_layout, shard_config
from services.engine.core.parallel.ranks import Ranks
from services.engine.core.parallel.shard import Shard, load_shard, outline_shard
from services.engine.core.parallel.stages import Costs, divide_layers, stage_groups
from services.engine.core.parallel.step_input import StepMemory
from services.engine.core.processors import default_threads
from services.engine.core.settings import CoreSettings

logger = logging.getLogger(__name__)

# What reads the memory of a rank's device.
make_reader: Callable[[torch.device], MemoryReader] = CardMemory

# Of what weights leave, where layers are divided among stages and nobody chose a share.
_FRACTION = 0.5


def layout_of(settings: CoreSettings) -> Layout:
    """How the settings divide the model."""
    return Layout(settings.tensor_parallel, settings.pipeline_parallel)


def device_of(first: torch.device, local_rank: int) -> torch.device:
    """The device of a rank, where the first rank of the machine has `first`.

    Raises:
        StartupError: there are fewer GPUs.
    """
    if first.type == "cpu":
        return first
    index = (first.index or 0) + local_rank
    count = torch.cuda.device_count()
    if index >= count:
        raise StartupError(f"a rank needs the device cuda:{index}, and {count} CUDA devices are")
    return torch.device("cuda", index)


class Rank:
    """One rank's part of a model, from the checkpoint to a KV cache.

    Raises StartupError for settings and models that are not to be divided so.
    """

    def __init__(
        self,
        opened: OpenedModel,
        settings: CoreSettings,
        place: Place,
        device: torch.device,
        local_ranks: int,
    ) -> None:
        """local_ranks: how many share this machine, and its memory where they are on CPUs."""
        if device.type == "cpu" and settings.weights not in ("auto", "bfloat16"):
            raise StartupError(
                f"weights in {settings.weights} are not divided over ranks on CPUs: with "
                "tensor_parallel or pipeline_parallel they are auto or bfloat16 there"
            )
        check_layout(opened.config, place.layout)
        self.config = opened.config
        self.place = place
        self.device = device
        try:
            self.dtype = resolve_dtype(settings.dtype, device)
        except ValueError as error:
            raise StartupError(str(error)) from None
        self._opened = opened
        self._settings = settings
        self._kv_dtype = kv_dtype(settings.kv_cache_format, self.dtype)
        self._weights = kept_weights(settings, device, self.dtype)
        self._sharing = local_ranks if device.type == "cpu" else 1
        if device.type == "cpu":
            torch.set_num_threads(max(1, (settings.threads or default_threads()) // local_ranks))
        self.groups = LayerGroups.of(self.config)
        self._reader: MemoryReader | None = None
        self._before: Readings

    @property
    def free_bytes(self) -> int:
        """What this rank could take of its device's memory."""
        return free_memory_bytes(self.device) // self._sharing

    def profile(self) -> None:
        """Begin to watch what memory steps take, once there are weights."""
        self._reader = make_reader(self.device)
        self._reader.reset()
        self._before = self._reader.read()

    def settings(self, graphs_bytes: int = 0) -> CoreSettings:
        """The settings by which the rank sizes its KV cache. Those who share the memory of a
        machine have equal parts of it; a card is divided by what steps took that were watched.

        graphs_bytes: kept for CUDA graphs. Raises StartupError where the cache that is asked for
        does not fit.
        """
        settings = self._settings
        if self._reader is None:
            share = settings.memory_share / self._sharing
            return msgspec.structs.replace(settings, memory_share=share)
        after = self._reader.read()
        self._reader.reset()
        budget = divide(settings, self._before, after, graphs_bytes)
        logger.info("memory of rank %d, %s: %s", self.place.rank, self.device, budget)
        return msgspec.structs.replace(settings, kv_cache_memory_bytes=max(1, budget.kv_cache))

    def step_memory(self, shapes: Sequence[CapturedShape]) -> StepMemory:
        """Where steps of shapes arrive that may be captured."""
        settings, context = self._settings, self.config.max_context_tokens
        return StepMemory(
            shapes,
            max_running_sequences=settings.max_running_sequences,
            max_blocks=-(-context // settings.block_size),
            num_groups=len(self.groups.windows),
            device=self.device,
        )

    def divide(self, free_bytes: Sequence[int], enough_rows: int) -> list[int]:
        """The first layer of each stage, and their number. free_bytes: of each rank."""
        layout = self.place.layout
        stages = divide_layers(
            self._costs(),
            self.groups,
            [min(free_bytes[rank] for rank in layout.ranks_of(s)) for s in range(layout.stages)],
            fraction=self._settings.kv_cache_memory_fraction or _FRACTION,
            enough_rows=enough_rows,
        )
        return [stage.start for stage in stages] + [self.config.num_layers]

    def _costs(self) -> Costs:
        config = shard_config(self.config, self.place.layout.tensor)
        model = build_skeleton(config).to(self.dtype)

        kept = self._bits() / (8 * self.dtype.itemsize)

        def bytes_of(*modules: torch.nn.Module | None) -> int:
            own = [each.parameters() for each in modules if each is not None]
            return int(kept * sum(each.nbytes for parameters in own for each in parameters))

        head = model.embedding if config.tie_embeddings else model.head
        return Costs(
            layers=tuple(bytes_of(layer) for layer in model.layers),
            first=bytes_of(model.embedding, getattr(model, "positions", None)),
            last=bytes_of(model.norm, head),
            layer_block=KVCache.bytes_per_block(
                1, self._settings.block_size, config.kv_heads, config.head_dim, self._kv_dtype
            ),
        )

    def _bits(self) -> float:
        """About how many bits an element of the weights takes, scales included."""
        checkpoint, whole = self._opened.checkpoint, 8.0 * self.dtype.itemsize
        if self._weights == "auto" and checkpoint.is_quantised:
            elements = sum(map(math.prod, checkpoint.shapes.values()))
            return min(whole, 8 * checkpoint.num_bytes / elements)
        return {"int4": 5.0, "int8": 9.0, "fp8": 8.0, "w8a8": 8.0}.get(self._weights, whole)

    def load(self, bounds: Sequence[int], ranks: Ranks) -> Shard:
        """Load what the rank has of the model. bounds: as `divide` has them.

        Raises:
            StartupError: memory is short.
            ModelFileError: a tensor cannot be read.
        """
        start, stop = list(pairwise(bounds))[self.place.stage]
        stage = range(start, stop)
        self._stage_groups = stage_groups(self.groups, stage)
        outline = outline_shard(self.config, self.place, stage, self.dtype)
        try:
            with contextlib.closing(self._opened.checkpoint) as checkpoint:
                model = load_shard(
                    outline,
                    self.config,
                    self.place,
                    checkpoint,
                    self.dtype,
                    self.device,
                    self._weights,
                )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise StartupError(
                f"the weights of rank {self.place.rank} do not fit on {self.device}: {error}"
            ) from None
        self.weight_bytes = sum(bytes_by_precision(model).values())
        self._kv_heads = model.config.kv_heads
        settings = self._settings
        if settings.max_adapters:
            model.take_adapters(
                max_adapters=settings.max_adapters, max_rank=settings.max_adapter_rank
            )
        return Shard(model, self.config, ranks)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block of its KV cache, once it has loaded its layers."""
        return KVCache.bytes_per_block(
            self._stage_groups.layers_per_block,
            self._settings.block_size,
            self._kv_heads,
            self.config.head_dim,
            self._kv_dtype,
        )

    def allocate(self, num_blocks: int) -> KVCache:
        """Its KV cache. Raises what KVCache raises."""
        return KVCache(
            num_layers=self.config.num_layers,
            num_blocks=num_blocks,
            block_size=self._settings.block_size,
            kv_heads=self._kv_heads,
            head_dim=self.config.head_dim,
            dtype=self._kv_dtype,
            device=self.device,
            groups=self._stage_groups,
        )


def choose_kernels(settings: CoreSettings, device: torch.device) -> None:
    """Make the kernels of a device known, as they are on rank 0."""
    if device.type == "cpu":
        cpu.activate(settings.cpu_kernels)
    else:
        torch.cuda.set_device(device)
        installed.activate()
        triton.activate()
        cuda.activate(device)
