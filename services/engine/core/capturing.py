"""Which steps are captured as graphs when an engine starts, and what that may take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.graphs import CapturedChoice, CapturingModel, GraphedModel
from services.engine.core.kernels.sampling import SamplingForm

logger = logging.getLogger(__name__)

# Of steps that decode, one token a sequence.
_LARGEST_DECODE = 512
# Of steps that verify drafts or compute short prompts: tokens, and the most of a sequence.
_SMALL_STEPS = (128, 64, 32, 16, 8)
# Of steps that compute prompts, captured in pieces: in larger ones a kernel takes longer than it
# takes to launch the next.
_PIECEWISE = (1024, 512, 256, 128, 64, 768, 384, 192, 96)
# Of steps in which tokens go through adapters there are fewer: to compute up to half as many tokens
# again, and up to twice as many where there are few, costs less than what the graph saves.
_ADAPTED_DECODES = (64, 32, 16, 8, 4, 2, 1, 96, 128, 192, 256, 384, 512)
_ADAPTED_SMALL_STEPS = (64, 16)
_ADAPTED_PIECEWISE = (1024, 512, 256, 128, 64)
# Of a draft model, sequences: beyond that a step costs with every token, and drafts seldom pay.
_LARGEST_DRAFTING = 64


@dataclass(frozen=True, slots=True)
class CaptureLimits:
    """What capturing may take. Sizes that are not captured by then are computed kernel by kernel,
    or padded to one that is."""

    seconds: float = 60.0
    num_bytes: int = 2 << 30


DRAFTING_LIMITS = CaptureLimits(seconds=20.0, num_bytes=256 << 20)


def shapes_to_capture(
    *,
    max_running_sequences: int,
    max_batch_tokens: int,
    max_query_length: int,
    takes_adapters: bool = False,
) -> tuple[CapturedShape, ...]:
    """What is worth capturing, the most valuable first: of one token a sequence, sizes of which the
    next is a quarter larger at most, from 32 on; with drafts (`max_query_length` over 1), few; and
    in pieces, of any lengths. Then the same through adapters, of fewer sizes."""
    largest = min(max_running_sequences, max_batch_tokens, _LARGEST_DECODE)
    sizes = {1, 2, 4, largest} | set(range(8, min(largest, 64), 8))
    step = 16
    while (begin := 4 * step) < largest:
        sizes |= set(range(begin, min(largest, 2 * begin), step))
        step *= 2
    powers = [size for size in sizes if size & (size - 1) == 0]
    order = sorted(powers, reverse=True) + sorted(sizes.difference(powers), reverse=True)
    decodes = [size for size in order if size <= largest]
    drafts = max_query_length if max_query_length > 1 else None
    shapes = _shapes(decodes, drafts, _SMALL_STEPS, _PIECEWISE)
    if takes_adapters:
        adapted = [size for size in _ADAPTED_DECODES if size < largest]
        adapted.insert(0, largest)
        further = _shapes(adapted, drafts, _ADAPTED_SMALL_STEPS, _ADAPTED_PIECEWISE)
        shapes += [replace(each, has_adapters=True) for each in further]
    return tuple(each for each in shapes if each.num_tokens <= max_batch_tokens)


def _shapes(
    decodes: Sequence[int], drafts: int | None, small: Sequence[int], pieces: Sequence[int]
) -> list[CapturedShape]:
    """drafts: the most tokens of a sequence in a small step; None: there are no such steps."""
    return [
        *(CapturedShape(size, 1) for size in decodes),
        *(CapturedShape(size, drafts) for size in small if drafts is not None),
        *(CapturedShape(size, None) for size in pieces),
    ]


def shapes_for_drafting(
    *, max_running_sequences: int, max_batch_tokens: int, max_query_length: int
) -> tuple[CapturedShape, ...]:
    """The same of a draft model: of one token a sequence, by powers of two, and of the first steps
    of drafts, which take in what has become known since the drafts before."""
    largest = min(max_running_sequences, max_batch_tokens, _LARGEST_DRAFTING)
    sizes = sorted({1 << power for power in range(largest.bit_length())} | {largest}, reverse=True)
    firsts = [size for size in _SMALL_STEPS if size <= min(max_batch_tokens, 2 * largest)]
    return tuple(_shapes(sizes, max_query_length, firsts, ()))


def capture_all(
    model: CapturingModel,
    kv_cache: Any,
    shapes: Sequence[CapturedShape],
    padding: Callable[[CapturedShape], ForwardBatch],
    limits: CaptureLimits,
) -> tuple[CapturedShape, ...]:
    """Capture shapes, in their order, until time or memory is used up; returns those that are.

    padding: makes a step of a shape of nothing but padding. A step that cannot be captured ends it,
    and the log says why: such steps are computed kernel by kernel.
    """
    started_s = time.monotonic()
    done: list[CapturedShape] = []
    reason = ""
    for shape in shapes:
        try:
            model.capture(padding(shape), kv_cache)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            reason = f"; {shape.num_tokens} tokens could not be: {error}"
            break
        done.append(shape)
        if time.monotonic() - started_s > limits.seconds or model.num_bytes() > limits.num_bytes:
            reason = "; time or memory for more is used up"
            break
    logger.info(
        "captured %d of %d shapes of steps as graphs in %.1f s (%.0f MiB): %s%s",
        len(done),
        len(shapes),
        time.monotonic() - started_s,
        model.num_bytes() / 2**20,
        _described(done, takes_adapters=any(each.has_adapters for each in shapes)),
        reason,
    )
    return tuple(done)


def capture_choices(
    model: GraphedModel,
    kv_cache: Any,
    shapes: Sequence[CapturedShape],
    padding: Callable[[CapturedShape], tuple[ForwardBatch, Callable[[], None]]],
    limits: CaptureLimits,
    sampler: DeviceSampler,
) -> dict[CapturedShape, tuple[SamplingForm, ...]]:
    """Capture steps of these shapes once more, with the choice of tokens behind them, until time or
    memory is used up; returns the forms of choice that there are of each.

    padding: as for `capture_all`, with what brings the step's input up to date.
    """
    started_s = time.monotonic()
    done: dict[CapturedShape, tuple[SamplingForm, ...]] = {}
    for shape in shapes:
        # Behind the pieces of a step, logits are computed by no graph.
        forms = sampler.captured_forms(shape.num_tokens) if shape.max_query_length else ()
        if not forms:
            continue
        try:
            for form in forms:
                batch, take_in = padding(shape)
                choice = CapturedChoice(form, take_in, sampler.choose)
                model.capture(batch, kv_cache, choice)
        except RuntimeError as error:
            logger.info("the choice of %d tokens cannot be captured: %s", shape.num_tokens, error)
            break
        done[shape] = forms
        if time.monotonic() - started_s > limits.seconds or model.num_bytes() > limits.num_bytes:
            break
    return done


def _described(done: Sequence[CapturedShape], *, takes_adapters: bool) -> str:
    plain, adapted = (
        ", ".join(
            str(each.num_tokens)
            for each in sorted(done, key=lambda each: each.num_tokens)
            if each.has_adapters == has_adapters
        )
        for has_adapters in (False, True)
    )
    return f"{plain} tokens" + (f"; with adapters {adapted or 'none'}" * takes_adapters)
