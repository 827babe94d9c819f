"""Builds an engine core from its settings: loads the model, sizes the KV cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from services.engine.core.adapters.loaded import Adapters
from services.engine.core.adapters.targets import Targets
from services.engine.core.admission import AdmissionLimits
from services.engine.core.backends import Backend, load_backend
from services.engine.core.block_pool import BlockPool
from services.engine.core.capturing import DRAFTING_LIMITS, CaptureLimits
from services.engine.core.constraints.compilation import Compiler
from services.engine.core.constraints.vocabulary import read_vocabulary
from services.engine.core.device_runner import DeviceRunner, make_device_runner
from services.engine.core.encoding.core import EncoderCore
from services.engine.core.encoding.startup import build_encoder, reads_whole_sequences
from services.engine.core.engine import EngineCore
from services.engine.core.errors import StartupError
from services.engine.core.generation_defaults import read_generation_defaults
from services.engine.core.graphs import GraphedModel
from services.engine.core.host_blocks import HostBlocks
from services.engine.core.kernels import OPS, cpu, cuda, installed, select, triton
from services.engine.core.kernels.choice import tune
from services.engine.core.kernels.device_check import check_device
from services.engine.core.kv_cache import KVCache
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.memory import free_memory_bytes, kv_cache_budget_bytes
from services.engine.core.messages import ModelFacts
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.loader import OpenedModel, open_model
from services.engine.core.parallel.backend import (
    ParallelBackend,
    refuse_ranks,
    start_workers,
)
from services.engine.core.parallel.model import ParallelModel
from services.engine.core.pool_growth import PoolGrowth
from services.engine.core.processors import available_processors, default_threads
from services.engine.core.profiling import plan_card
from services.engine.core.runner import Runner
from services.engine.core.scheduler import Scheduler
from services.engine.core.settings import CoreSettings
from services.engine.core.speculation.loading import load_draft_model, make_speculator
from services.engine.core.table_shape import TableShape
from services.engine.core.warm_up import warm_up

logger = logging.getLogger(__name__)


def build_engine(
    settings: CoreSettings,
    *,
    make_runner: Callable[..., Runner | DeviceRunner] = Runner,
    open_model: Callable[..., OpenedModel] = open_model,
) -> tuple[EngineCore | EncoderCore, ModelFacts]:
    """Load the model and make an engine ready for its first sequence.

    `make_runner` takes what Runner takes, for those who want to look over the shoulder of a model
    that generates on a CPU. `open_model` takes what `loader.open_model` takes: weights may come
    from elsewhere than files.

    Raises:
        StartupError: the device is missing or the KV cache does not fit.
        ModelFileError: the model files are missing or damaged.
    """
    started_s = time.monotonic()
    num_threads = settings.threads or default_threads()
    torch.set_num_threads(num_threads)
    device = resolve_device(settings.device)
    if device.type == "cpu":
        cpu.activate(settings.cpu_kernels)
    else:
        torch.cuda.set_device(device)  # kernels are launched on the current one
        installed.activate()
        triton.activate()
        cuda.activate(device)
    if reads_whole_sequences(settings.model_path):
        refuse_ranks(settings, "an encoder")
        if settings.sparse_attention is not None:
            raise StartupError("sparse_attention is for models that generate")
        return build_encoder(settings, device)
    workers = start_workers(settings)  # first, so that they start beside what follows
    refused = check_device(device).refused if device.type == "cuda" else {}
    selections = select(device.type, _excluded(settings, device), refused)
    for selection in selections:
        logger.info("kernel %s", selection)
    opened = open_model(
        settings.model_path,
        max_context_tokens=settings.max_context_tokens,
        allow_pickled=settings.allow_pickled,
        sparse_attention=settings.sparse_attention,
    )
    config = opened.config
    backend: Backend
    if workers is not None:
        backend = parallel = ParallelBackend(opened, settings, device, selections, workers)
        settings = parallel.settings
    else:
        backend = load_backend(opened, settings, device, selections)
    draft_model = load_draft_model(settings, config, device, selections)
    groups = LayerGroups.of(config)
    num_groups = len(groups.windows)
    bytes_per_block = backend.bytes_per_block(settings.block_size, groups)
    bytes_per_row = num_groups * bytes_per_block
    if draft_model is not None:
        bytes_per_row += draft_model.bytes_per_block(settings)
    memory: dict[str, int] = {}
    graphs_bytes = 0
    if device.type == "cuda":
        if settings.cuda_graphs == "auto":
            graphs_bytes = CaptureLimits().num_bytes
            graphs_bytes += DRAFTING_LIMITS.num_bytes if draft_model is not None else 0
        if workers is not None:
            parallel.profile()
        budget = plan_card(
            settings,
            backend,
            config,
            groups,
            bytes_per_row,
            device,
            graphs_bytes=graphs_bytes,
        )
        memory = budget.by_part()
        settings = msgspec.structs.replace(settings, kv_cache_memory_bytes=max(1, budget.kv_cache))
    num_rows = count_rows(settings, config, bytes_per_row, device)
    if workers is not None:
        num_rows = min(num_rows, parallel.count_rows(graphs_bytes))
    num_blocks = num_rows * num_groups
    shape = TableShape.of_steps(settings.block_size, groups.windows, settings.max_batch_tokens)
    max_context_tokens = shape.most_tokens(num_blocks, config.max_context_tokens)
    try:
        model, kv_cache = backend.allocate(num_blocks, settings, groups)
        speculator = make_speculator(settings, draft_model, num_rows)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise StartupError(
            f"a KV cache of {num_rows * bytes_per_row} bytes does not fit on {device}: {error}"
        ) from None
    limits = AdmissionLimits(max_context_tokens=max_context_tokens, vocab_size=config.vocab_size)
    warm_up(
        model,
        kv_cache,
        device=device,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        max_batch_tokens=settings.max_batch_tokens,
        limits=limits,
        windows=groups.windows,
    )
    adapters = None
    if settings.max_adapters:
        adapters = Adapters(
            model,
            Targets.of_model(opened.skeleton),
            max_adapters=settings.max_adapters,
            max_rank=settings.max_adapter_rank,
            device=device,
        )
        adapters.load_first(settings.adapters, may_fail=settings.adapters_may_fail)
    scheduler = Scheduler(
        BlockPool(
            num_blocks,
            settings.block_size,
            PoolGrowth(num_blocks) if device.type == "cpu" else None,
        ),
        limits,
        eos_token_ids=config.eos_token_ids,
        max_batch_tokens=settings.max_batch_tokens,
        max_running_sequences=settings.max_running_sequences,
        max_waiting_sequences=settings.max_waiting_sequences,
        max_waiting_tokens=settings.max_waiting_tokens,
        step_latency_target_ms=settings.step_latency_target_ms,
        prefix_cache=settings.prefix_cache,
        windows=groups.windows,
        speculator=speculator,
        compiler=Compiler(
            partial(read_vocabulary, settings.model_path, config.vocab_size, config.eos_token_ids)
        ),
        adapters=adapters,
        store=_host_blocks(kv_cache, settings),
    )
    if device.type == "cuda":
        if workers is None:
            tune(model.matrices(), getattr(torch, backend.dtype))
        else:
            parallel.tune()
        make_runner = partial(
            make_device_runner,
            vocab_size=config.vocab_size,
            captures=settings.cuda_graphs == "auto",
            drafts=speculator is not None,
            graphed=GraphedModel if workers is None else ParallelModel.graphed,
        )
    runner = make_runner(
        model,
        kv_cache,
        device=device,
        block_size=settings.block_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_running_sequences=settings.max_running_sequences,
        max_context_tokens=max_context_tokens,
        num_groups=num_groups,
        takes_adapters=adapters is not None,
    )
    facts = ModelFacts(
        architecture=config.architecture,
        num_layers=config.num_layers,
        num_parameters=sum(weight.numel() for weight in opened.skeleton.parameters()),
        vocab_size=config.vocab_size,
        max_context_tokens=max_context_tokens,
        eos_token_ids=config.eos_token_ids,
        dtype=backend.dtype,
        device=str(device),
        block_size=settings.block_size,
        num_blocks=num_blocks,
        kv_cache_memory_bytes=num_rows * bytes_per_row,
        load_time_s=time.monotonic() - started_s,
        kernels=backend.kernels,
        default_sampling=read_generation_defaults(Path(settings.model_path))
        | settings.default_sampling,
        adapters={} if adapters is None else adapters.sizes,
        takes_adapters=adapters is not None,
        memory=memory,
    )
    logger.info(
        "loaded %s (%.0f M parameters, %s) on %s in %.1f s; the KV cache has %d blocks of %d "
        "tokens%s (%.0f MiB), a sequence at most %d; %d threads",
        facts.architecture,
        facts.num_parameters / 1e6,
        facts.dtype,
        facts.device,
        facts.load_time_s,
        num_blocks,
        settings.block_size,
        "" if num_groups == 1 else f" of a group of layers, of {num_groups}",
        facts.kv_cache_memory_bytes / 2**20,
        max_context_tokens,
        num_threads,
    )
    plans_ahead = _plans_ahead(settings, device, num_threads)
    logger.info("steps are planned %s", "ahead" if plans_ahead else "one at a time")
    return EngineCore(scheduler, runner, plans_ahead=plans_ahead, adapters=adapters), facts


def resolve_device(name: str) -> torch.device:
    """The device that `name` means; "auto" is CUDA where there is a card, else the CPU.

    Raises:
        StartupError: there is no such device here.
    """
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartupError(f"{name!r} is not a device; use auto, cpu or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"{name!r} is not a device; use auto, cpu or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise StartupError(f"the device {name!r} is not there: {count} CUDA devices are")
        return torch.device("cuda", index)
    return device


def _excluded(settings: CoreSettings, device: torch.device) -> tuple[str, ...]:
    """The implementations that settings exclude, all of which there are on a GPU."""
    if device.type == "cpu":
        return ()
    names = {each.name for op in OPS.values() for each in op.implementations.get(device.type, [])}
    for name in settings.excluded_kernels:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise StartupError(
                f"excluded_kernels names {name!r}, which no operation has on {device}: {known}"
            )
    return settings.excluded_kernels


def _host_blocks(kv_cache: Any, settings: CoreSettings) -> HostBlocks | None:
    if settings.swap_memory_bytes == 0:
        return None
    if not isinstance(kv_cache, KVCache):
        raise StartupError(
            "blocks of preempted sequences are kept for a GPU of one rank only: set swap_bytes to 0"
        )
    try:
        return HostBlocks(kv_cache, settings.swap_memory_bytes)
    except MemoryError as error:
        raise StartupError(
            f"the host has no {settings.swap_memory_bytes} bytes for preempted sequences: {error}"
        ) from None


def _plans_ahead(settings: CoreSettings, device: torch.device, num_threads: int) -> bool:
    if settings.plan_ahead != "auto":
        return settings.plan_ahead == "on"
    return device.type != "cpu" or num_threads < available_processors()


def count_rows(
    settings: CoreSettings, config: ModelConfig, bytes_per_row: int, device: torch.device
) -> int:
    """The rows of blocks, for all layers, that the KV cache is to have.

    Raises:
        StartupError: there is not memory for one, or not for what is asked for.
    """
    budget = kv_cache_budget_bytes(
        device,
        requested_bytes=settings.kv_cache_memory_bytes,
        fraction=settings.kv_cache_memory_fraction,
        share=settings.memory_share,
        waiting_weights_bytes=settings.waiting_weights_bytes,
    )
    # More than every running sequence at full length could fill would lie idle.
    useful = settings.max_running_sequences * -(-config.max_context_tokens // settings.block_size)
    num_rows = min(budget // bytes_per_row, useful)
    if num_rows < 1:
        raise StartupError(
            f"a KV cache of {budget} bytes holds no block: one block of {settings.block_size} "
            f"tokens takes {bytes_per_row} bytes"
        )
    free = free_memory_bytes(device)
    if num_rows * bytes_per_row > free:
        # A CPU would promise the memory now and fail in the middle of a request.
        raise StartupError(
            f"a KV cache of {num_rows * bytes_per_row} bytes does not fit on {device}: "
            f"{free} bytes are free"
        )
    return num_rows
