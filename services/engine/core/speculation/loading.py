"""From settings to a speculator, a draft model included where one is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from services.engine.core.backends import Backend, load_backend
from services.engine.core.block_pool import BlockPool
from services.engine.core.device_runner import DeviceRunner, make_drafting_runner
from services.engine.core.errors import StartupError
from services.engine.core.kernels import Selection
from services.engine.core.kernels.choice import tune
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.loader import open_model
from services.engine.core.runner import Runner
from services.engine.core.settings import CoreSettings
from services.engine.core.speculation.draft_model import DraftModelSpeculator
from services.engine.core.speculation.speculator import NgramSpeculator, Speculator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model that is loaded, on its way to its KV cache."""

    config: ModelConfig
    backend: Backend
    device: torch.device

    @property
    def groups(self) -> LayerGroups:
        """One group: what has slid out of a window would not be worth giving back."""
        return LayerGroups.single(self.config.num_layers)

    def bytes_per_block(self, settings: CoreSettings) -> int:
        """Bytes of one block of its KV cache."""
        return self.backend.bytes_per_block(settings.block_size, self.groups)

    def speculator(self, num_blocks: int, settings: CoreSettings) -> Speculator:
        """Give it a KV cache of `num_blocks` blocks, and a runner.

        Raises torch.OutOfMemoryError, RuntimeError or MemoryError where the cache does not fit.
        """
        model, kv_cache = self.backend.allocate(num_blocks, settings, self.groups)
        max_context_tokens = min(self.config.max_context_tokens, num_blocks * settings.block_size)
        make_runner: Callable[..., Runner | DeviceRunner] = Runner
        if self.device.type == "cuda":
            tune(model.matrices(), getattr(torch, self.backend.dtype))
            make_runner = partial(
                make_drafting_runner,
                vocab_size=self.config.vocab_size,
                captures=settings.cuda_graphs == "auto",
            )
        runner = make_runner(
            model,
            kv_cache,
            device=self.device,
            block_size=settings.block_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_running_sequences=settings.max_running_sequences,
            max_context_tokens=max_context_tokens,
        )
        return DraftModelSpeculator(
            runner,
            BlockPool(num_blocks, settings.block_size),
            max_batch_tokens=settings.max_batch_tokens,
            max_running_sequences=settings.max_running_sequences,
            max_context_tokens=max_context_tokens,
        )


def load_draft_model(
    settings: CoreSettings,
    target: ModelConfig,
    device: torch.device,
    selections: list[Selection],
) -> DraftModel | None:
    """The draft model that the settings ask for, if any.

    Raises:
        StartupError: its vocabulary is not the target's, or memory is short.
        ModelFileError: it is missing or damaged.
    """
    if settings.draft_model_path is None or settings.speculation not in ("auto", "draft"):
        return None
    opened = open_model(settings.draft_model_path)
    if opened.config.vocab_size != target.vocab_size:
        raise StartupError(
            f"the draft model {settings.draft_model_path} has a vocabulary of "
            f"{opened.config.vocab_size} tokens, the model one of {target.vocab_size}: a draft "
            "model must share the model's vocabulary"
        )
    backend = load_backend(opened, settings, device, selections, takes_adapters=False)
    return DraftModel(opened.config, backend, device)


def make_speculator(
    settings: CoreSettings, draft_model: DraftModel | None, num_blocks: int
) -> Speculator | None:
    """What drafts for the engine, None where nothing is to.

    Raises what `DraftModel.speculator` raises.
    """
    if draft_model is not None:
        logger.info("tokens are drafted by %s", settings.draft_model_path)
        return draft_model.speculator(num_blocks, settings)
    if settings.speculation == "off":
        logger.info("tokens are not drafted")
        return None
    logger.info("tokens are drafted by prompt look-up")
    return NgramSpeculator()
