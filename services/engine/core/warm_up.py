"""A request of the engine's own before the first of others, which then need not wait for what is
done once: kernels loaded, libraries set up, buffers made. It also shows that the model computes."""

from __future__ import annotations

from typing import Any

import torch

from services.engine.core.admission import AdmissionLimits
from services.engine.core.block_pool import BlockPool
from services.engine.core.engine import EngineCore
from services.engine.core.errors import StartupError
from services.engine.core.messages import FinishReason, SequenceRequest, Stopping
from services.engine.core.model_config import Window
from services.engine.core.runner import Model, Runner
from services.engine.core.scheduler import Scheduler

PROMPT_TOKENS = 64
# A prefill and two decodes.
COMPLETION_TOKENS = 3


def warm_up(
    model: Model,
    kv_cache: Any,
    *,
    device: torch.device,
    num_blocks: int,
    block_size: int,
    max_batch_tokens: int,
    limits: AdmissionLimits,
    windows: tuple[Window | None, ...] = (None,),
) -> None:
    """Computes a short request in the first blocks, which are free again afterwards; nothing counts
    it.

    Raises:
        StartupError: the model cannot compute it.
    """
    completion_tokens = min(COMPLETION_TOKENS, limits.max_context_tokens - 1)
    if completion_tokens < 1:
        return
    prompt_tokens = min(PROMPT_TOKENS, limits.max_context_tokens - completion_tokens)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size),
        limits,
        eos_token_ids=(),
        max_batch_tokens=max_batch_tokens,
        max_running_sequences=1,
        max_waiting_sequences=1,
        max_waiting_tokens=prompt_tokens,
        step_latency_target_ms=1e6,
        prefix_cache=False,
        windows=windows,
    )
    runner = Runner(
        model,
        kv_cache,
        device=device,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running_sequences=1,
        max_context_tokens=limits.max_context_tokens,
        num_groups=len(windows),
    )
    if device.type == "cuda" and num_blocks > 1:
        kv_cache.copy_blocks([(0, 1)])  # which compiles its kernel
    core = EngineCore(scheduler, runner)
    stopping = Stopping(max_tokens=completion_tokens, ignore_eos=True)
    core.add([SequenceRequest(0, [0] * prompt_tokens, stopping=stopping)])
    while core.has_work:
        for delta in core.step().deltas:
            finish = delta.finish
            if finish is not None and finish.reason is FinishReason.ERROR:
                raise StartupError(f"the model does not compute: {finish.error}")
