"""Engine cores over the hash model, and the reference their outputs are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from services.engine.core.admission import AdmissionLimits
from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.block_pool import BlockPool
from services.engine.core.block_tables import BlockStore
from services.engine.core.capturing import CaptureLimits
from services.engine.core.device_runner import DeviceRunner
from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.engine import EngineCore
from services.engine.core.graphs import Compute, GraphedModel
from services.engine.core.messages import SequenceRequest
from services.engine.core.noise import stream_key, uniforms
from services.engine.core.pool_growth import PoolGrowth
from services.engine.core.runner import Runner
from services.engine.core.sampler import SamplingBatch, sample
from services.engine.core.scheduler import Scheduler
from services.engine.core.speculation.speculator import Speculator
from services.engine.core.table_shape import TableShape
from tests.fakes.hash_model import (
    EOS_TOKEN_ID,
    NO_WINDOW,
    VOCAB_SIZE,
    HashCache,
    HashStore,
    Windows,
    logits_after,
    make_hash_model,
)

# The longest sequence of any of these engines.
CONTEXT_TOKENS = 512


def make_scheduler(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_running_sequences: int = 4,
    max_waiting_sequences: int = 64,
    max_waiting_tokens: int = 1 << 18,
    step_latency_target_ms: float = 1e9,
    prefix_cache: bool = True,
    grows: bool = False,
    speculator: Speculator | None = None,
    windows: Windows = NO_WINDOW,
    store: BlockStore | None = None,
) -> Scheduler:
    """A scheduler whose context is all that its pool holds."""
    context_tokens = context_of(num_blocks, block_size, max_batch_tokens, windows)
    return Scheduler(
        BlockPool(num_blocks, block_size, PoolGrowth(num_blocks) if grows else None),
        AdmissionLimits(max_context_tokens=context_tokens, vocab_size=VOCAB_SIZE),
        eos_token_ids=(EOS_TOKEN_ID,),
        max_batch_tokens=max_batch_tokens,
        max_running_sequences=max_running_sequences,
        max_waiting_sequences=max_waiting_sequences,
        max_waiting_tokens=max_waiting_tokens,
        step_latency_target_ms=step_latency_target_ms,
        prefix_cache=prefix_cache,
        windows=windows,
        speculator=speculator,
        store=store,
    )


def context_of(
    num_blocks: int, block_size: int, max_batch_tokens: int, windows: Windows = NO_WINDOW
) -> int:
    """The longest sequence of a pool, of `CONTEXT_TOKENS` at most."""
    shape = TableShape.of_steps(block_size, windows, max_batch_tokens)
    return shape.most_tokens(num_blocks, CONTEXT_TOKENS)


def make_engine(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_running_sequences: int = 4,
    max_waiting_sequences: int = 64,
    max_waiting_tokens: int = 1 << 18,
    step_latency_target_ms: float = 1e9,
    prefix_cache: bool = True,
    grows: bool = False,
    speculator: Speculator | None = None,
    plans_ahead: bool = False,
    overlaps: bool = False,
    captured_shapes: tuple[CapturedShape, ...] = (),
    saved_blocks: int = 0,
    windows: Windows = NO_WINDOW,
    samples_there: bool = False,
) -> EngineCore:
    """An engine core over the hash model.

    overlaps: whether it runs as on a device that computes steps beside the host. samples_there:
    whether tokens are chosen as on a device, too, by the graphs of captured shapes. saved_blocks:
    of preempted sequences that are kept beside the cache.
    """
    model, cache = make_hash_model(windows), HashCache(num_blocks, block_size)
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running_sequences=max_running_sequences,
        max_waiting_sequences=max_waiting_sequences,
        max_waiting_tokens=max_waiting_tokens,
        step_latency_target_ms=step_latency_target_ms,
        prefix_cache=prefix_cache,
        grows=grows,
        speculator=speculator,
        windows=windows,
        store=HashStore(cache, saved_blocks) if saved_blocks else None,
    )
    shape: dict[str, Any] = {
        "device": torch.device("cpu"),
        "block_size": block_size,
        "max_batch_tokens": max_batch_tokens,
        "max_running_sequences": max_running_sequences,
        "max_context_tokens": scheduler.limits.max_context_tokens,
        "num_groups": len(windows),
    }
    if not overlaps:
        return EngineCore(scheduler, Runner(model, cache, **shape), plans_ahead=plans_ahead)
    has_graphs = samples_there and bool(captured_shapes)
    if has_graphs:
        recorder: Any = _Anew()
        model = GraphedModel(_Hashing(model), recorder, captured_shapes, device=shape["device"])
    runner = DeviceRunner(
        model, cache, vocab_size=VOCAB_SIZE, captured_shapes=captured_shapes, **shape
    )
    if samples_there:
        device = shape["device"]
        runner._sampler = DeviceSampler(device, max_batch_tokens, VOCAB_SIZE, at_once=False)
        runner._inputs._latest = runner._sampler.token_ids
    if has_graphs:
        runner.capture(CaptureLimits())
    return EngineCore(scheduler, runner, plans_ahead=True)


class _Anew:
    """Replays steps by computing them anew from where their input was captured."""

    def record(self, compute: Compute) -> Compute:
        compute()
        return compute

    def num_bytes(self) -> int:
        return 0


class _Hashing:
    class config:
        vocab_size = VOCAB_SIZE

    logits_memory: torch.Tensor | None = None

    def __init__(self, compute: Any) -> None:
        self._compute = compute

    def __call__(self, batch: ForwardBatch, cache: HashCache) -> torch.Tensor:
        logits: torch.Tensor = self._compute(batch, cache)
        return logits


def reference_output(
    request: SequenceRequest, context_tokens: int, windows: Windows = NO_WINDOW
) -> list[int]:
    """What `request` generates alone, token by token, without batch, cache or scheduler."""
    sampling, stopping = request.sampling, request.stopping
    tokens = list(request.prompt_token_ids)
    output: list[int] = []
    room = context_tokens - len(tokens)
    limit = room if stopping.max_tokens is None else min(room, stopping.max_tokens)
    ends = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else {EOS_TOKEN_ID})
    key = np.array([stream_key(sampling.seed, request.choice_index)], np.uint64)
    while len(output) < limit:
        logits = logits_after(tokens, windows)
        numbers = logits.numpy()  # the same memory
        for token in set(tokens) if sampling.repetition_penalty != 1 else ():
            numbers[token] *= sampling.repetition_penalty ** (-1 if numbers[token] > 0 else 1)
        for token in set(output):
            numbers[token] -= sampling.presence_penalty
            numbers[token] -= sampling.frequency_penalty * output.count(token)
        for token, bias in sampling.logit_bias.items():
            numbers[token] += bias
        if len(output) < stopping.min_tokens:
            logits[list(ends)] = -torch.inf
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            batch = SamplingBatch(
                temperature=np.array([sampling.temperature], np.float32),
                top_k=np.array([sampling.top_k]),
                top_p=np.array([sampling.top_p], np.float32),
                min_p=np.array([sampling.min_p], np.float32),
                uniforms=uniforms(key, np.array([len(output)])),
                logprobs=np.array([-1]),
            )
            token = sample(logits.unsqueeze(0), batch).token_ids[0]
        tokens.append(token)
        output.append(token)
        if len(output) >= stopping.min_tokens and (
            token in ends
            or any(output[-len(stop) :] == list(stop) for stop in stopping.stop_sequences)
        ):
            break
    return output
