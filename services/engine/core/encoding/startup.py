"""Builds the engine core of an encoder from its settings."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from services.engine.core.admission import QueueLimits
from services.engine.core.encoding.answers import Answers, load_dense
from services.engine.core.encoding.batcher import DynamicBatcher
from services.engine.core.encoding.core import EncoderCore, EncoderRunner
from services.engine.core.encoding.decoder import makes_embeddings, open_decoder
from services.engine.core.encoding.loader import is_encoder, open_encoder
from services.engine.core.encoding.model import EncoderShape, Encodes, OpenedModel
from services.engine.core.errors import StartupError
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.messages import EncodeRequest, EncodeTask, ModelFacts
from services.engine.core.models.dtype import resolve_dtype
from services.engine.core.models.precision import WeightChoice
from services.engine.core.processors import default_threads, own_processors
from services.engine.core.settings import CoreSettings

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 64


def build_encoder(
    settings: CoreSettings,
    device: torch.device,
    *,
    make_runner: Callable[..., EncoderRunner] = EncoderRunner,
) -> tuple[EncoderCore, ModelFacts]:
    """Load an encoder and make its engine ready for the first sequence.

    `make_runner` takes what EncoderRunner takes, for those who want to look over its shoulder.

    Raises:
        StartupError: the settings ask for what is not to be had here, or memory is short.
        ModelFileError: the model files are missing or damaged.
    """
    started_s = time.monotonic()
    opened = _open(settings)
    shape = opened.shape
    try:
        with contextlib.closing(opened.checkpoint):
            model, dtype, kernels = _load(opened, settings, device)
            answers = Answers(
                opened.outputs,
                shape.hidden_size,
                opened.load_head(device),
                [load_dense(config, device) for config in opened.outputs.dense],
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(f"the weights do not fit on {device}: {error}") from None
    runner = make_runner(model, answers, device)
    tasks = _tasks(shape)
    _warm_up(runner, tasks[0], shape.max_tokens)
    facts = ModelFacts(
        architecture=shape.architecture,
        num_layers=shape.num_layers,
        num_parameters=sum(weight.numel() for weight in opened.skeleton.parameters()),
        vocab_size=shape.vocab_size,
        max_context_tokens=shape.max_tokens,
        eos_token_ids=(),
        dtype=dtype,
        device=str(device),
        block_size=0,
        num_blocks=0,
        kv_cache_memory_bytes=0,
        load_time_s=time.monotonic() - started_s,
        kernels=kernels,
        tasks=tasks,
        embedding_size=answers.embedding_size if "embed" in tasks else 0,
        labels=shape.labels,
    )
    logger.info(
        "loaded %s (%.0f M parameters, %s) on %s in %.1f s; it can %s sequences of at most %d "
        "tokens",
        facts.architecture,
        facts.num_parameters / 1e6,
        facts.dtype,
        facts.device,
        facts.load_time_s,
        " and ".join(tasks),
        shape.max_tokens,
    )
    batcher = DynamicBatcher(
        settings.batcher,
        QueueLimits(settings.batcher.max_waiting_sequences, settings.max_waiting_tokens),
        target_s=settings.step_latency_target_ms / 1000,
    )
    return EncoderCore(batcher, runner), facts


def reads_whole_sequences(path: str) -> bool:
    """Whether a model answers with vectors or scores, not with tokens."""
    return is_encoder(path) or makes_embeddings(path)


def _open(settings: CoreSettings) -> OpenedModel:
    how: dict[str, Any] = {
        "max_context_tokens": settings.max_context_tokens,
        "allow_pickled": settings.allow_pickled,
    }
    path = settings.model_path
    return open_encoder(path, **how) if is_encoder(path) else open_decoder(path, **how)


def _tasks(shape: EncoderShape) -> tuple[str, ...]:
    if not shape.labels:
        return ("embed",)
    return ("classify", "score") if len(shape.labels) == 1 else ("classify",)


def _load(
    opened: OpenedModel, settings: CoreSettings, device: torch.device
) -> tuple[Encodes, str, dict[str, str]]:
    """The model, its dtype, and what computes it."""
    if settings.weights in ("fp8", "w8a8"):
        raise StartupError(f"weights in {settings.weights} are for decoders that write text")
    reason = _why_not_native(settings, device)
    library = cpu.active()
    if reason is None and library is not None:
        num_threads = settings.threads or default_threads()
        # torch has little left to do, for which no second pool of threads is worth waking.
        torch.set_num_threads(1)
        team = Team(library, num_threads, own_processors(num_threads))
        try:
            model, weight_bytes = opened.load_natively(
                team, cast(WeightChoice, settings.weights), batch_tokens=settings.batcher.max_tokens
            )
        except UnsupportedModelError as error:
            reason = f"the native kernels do not serve this model: {error}"
            torch.set_num_threads(num_threads)
        else:
            stored = ", ".join(
                f"{name} {size / 2**20:.0f} MiB" for name, size in weight_bytes.items()
            )
            logger.info(
                "batches run natively: %s, weights %s, %d threads",
                library.isa,
                stored,
                num_threads,
            )
            return model, "bfloat16", {"encoder": f"{library.isa} ({stored})"}
    if settings.weights in ("int8", "int4"):
        raise StartupError(
            f"weights in {settings.weights} need the native kernels of a CPU: {reason}"
        )
    logger.info("batches run on torch: %s", reason)
    try:
        dtype = resolve_dtype(settings.dtype, device)
    except ValueError as error:
        raise StartupError(str(error)) from None
    loaded = opened.load(dtype, device, batch_tokens=settings.batcher.max_tokens)
    return loaded, str(dtype).removeprefix("torch."), {"encoder": "torch"}


def _why_not_native(settings: CoreSettings, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the device is {device}"
    if settings.dtype not in ("auto", "bfloat16"):
        return f"the dtype is {settings.dtype}"
    return cpu.why_not()


def _warm_up(runner: EncoderRunner, kind: str, max_tokens: int) -> None:
    """Raises StartupError where the model cannot compute a short sequence."""
    task = EncodeTask(kind)  # type: ignore[arg-type]
    try:
        runner.run([EncodeRequest(0, [0] * min(_WARM_UP_TOKENS, max_tokens), task)])
    except Exception as error:
        raise StartupError(f"the model does not compute: {error}") from error
