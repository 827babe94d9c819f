"""Builds the engine core of an encoder from its settings."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from services.engine.core.admission import QueueLimits
from services.engine.core.encoding.answers import Answers, load_dense
from services.engine.core.encoding.batcher import DynamicBatcher
from services.engine.core.encoding.core import EncoderCore, EncoderRunner
from services.engine.core.encoding.loader import OpenedEncoder, open_encoder
from services.engine.core.encoding.model import Encodes
from services.engine.core.encoding.native import NativeEncoder
from services.engine.core.errors import StartupError
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.messages import EncodeRequest, EncodeTask, ModelFacts
from services.engine.core.models.dtype import resolve_dtype
from services.engine.core.models.native import UnsupportedModelError
from services.engine.core.processors import default_threads, own_processors
from services.engine.core.settings import CoreSettings
from services.runtime.modelfiles import ModelFileError

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
    opened = open_encoder(settings.model_path)
    config = opened.skeleton.config
    max_tokens = _max_tokens(settings, opened)
    try:
        with contextlib.closing(opened.checkpoint):
            model, dtype, kernels = _load(opened, settings, device)
            answers = _load_answers(opened, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(f"the weights do not fit on {device}: {error}") from None
    runner = make_runner(model, answers, device)
    tasks = _tasks(opened)
    _warm_up(runner, tasks[0], max_tokens)
    facts = ModelFacts(
        architecture=config.architecture,
        num_layers=config.num_layers,
        num_parameters=sum(weight.numel() for weight in opened.skeleton.parameters()),
        vocab_size=config.vocab_size,
        max_context_tokens=max_tokens,
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
        labels=config.labels,
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
        max_tokens,
    )
    batcher = DynamicBatcher(
        settings.batcher,
        QueueLimits(settings.batcher.max_waiting_sequences, settings.max_waiting_tokens),
        target_s=settings.step_latency_target_ms / 1000,
    )
    return EncoderCore(batcher, runner), facts


def _tasks(opened: OpenedEncoder) -> tuple[str, ...]:
    labels = opened.skeleton.config.labels
    if not labels:
        return ("embed",)
    return ("classify", "score") if len(labels) == 1 else ("classify",)


def _max_tokens(settings: CoreSettings, opened: OpenedEncoder) -> int:
    """As the settings say, else as the model was made for; never more than it has positions."""
    most = opened.skeleton.config.max_tokens
    wanted = settings.max_context_tokens
    if wanted is None:
        return min(opened.outputs.max_tokens or most, most)
    if wanted > most:
        problem = f"has positions for {most} tokens, not for {wanted}"
        raise ModelFileError(Path(settings.model_path), problem)
    return wanted


def _load(
    opened: OpenedEncoder, settings: CoreSettings, device: torch.device
) -> tuple[Encodes, str, dict[str, str]]:
    """The model, its dtype, and what computes it."""
    reason = _why_not_native(settings, device)
    library = cpu.active()
    if reason is None and library is not None:
        num_threads = settings.threads or default_threads()
        # torch has little left to do, for which no second pool of threads is worth waking.
        torch.set_num_threads(1)
        team = Team(library, num_threads, own_processors(num_threads))
        try:
            model = NativeEncoder(opened.skeleton, opened.checkpoint, team, settings.weights)
        except UnsupportedModelError as error:
            reason = f"the native kernels do not serve this model: {error}"
            torch.set_num_threads(num_threads)
        else:
            stored = ", ".join(
                f"{name} {size / 2**20:.0f} MiB" for name, size in model.weight_bytes.items()
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
    loaded = opened.load(dtype, device)
    return loaded, str(dtype).removeprefix("torch."), {"encoder": "torch"}


def _why_not_native(settings: CoreSettings, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the device is {device}"
    if settings.dtype not in ("auto", "bfloat16"):
        return f"the dtype is {settings.dtype}"
    return cpu.why_not()


def _load_answers(opened: OpenedEncoder, device: torch.device) -> Answers:
    return Answers(
        opened.outputs,
        opened.skeleton.config.hidden_size,
        opened.load_head(device),
        [load_dense(config, device) for config in opened.outputs.dense],
    )


def _warm_up(runner: EncoderRunner, kind: str, max_tokens: int) -> None:
    """Raises StartupError where the model cannot compute a short sequence."""
    task = EncodeTask(kind)  # type: ignore[arg-type]
    try:
        runner.run([EncodeRequest(0, [0] * min(_WARM_UP_TOKENS, max_tokens), task)])
    except Exception as error:
        raise StartupError(f"the model does not compute: {error}") from error
