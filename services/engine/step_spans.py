"""Spans of what happened to a sequence inside the core, made afterwards from its timing facts."""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.context import Context
from prometheus_client import Histogram

from services.engine.core.messages import Delta, FinishReason, Timing
from services.runtime.telemetry import get_tracer


class SequenceSpans:
    """Follows the sequences of one request and records their spans, however they end."""

    def __init__(
        self, prompt_tokens: int, queue_duration: Histogram, context: Context | None = None
    ) -> None:
        """The spans are made in `context`; where it is None, in the current one."""
        self._context = context
        self._prompt_tokens = prompt_tokens
        self._queue_duration = queue_duration
        self._live: dict[int, Timing] = {}
        self._completion_tokens: dict[int, int] = {}

    def follow(self, delta: Delta) -> None:
        """Take in a delta; its timing facts come with a first token and with the end."""
        sequence_id = delta.sequence_id
        counted = self._completion_tokens.get(sequence_id, 0)
        self._completion_tokens[sequence_id] = counted + len(delta.token_ids)
        timing = delta.timing
        if timing is None:
            return
        if sequence_id not in self._live and timing.prefill_start_ns:
            self._queue_duration.observe((timing.prefill_start_ns - timing.queued_ns) / 1e9)
        self._live[sequence_id] = timing
        if delta.finish is not None and delta.finish.reason in (
            FinishReason.STOP,
            FinishReason.LENGTH,
        ):
            self._record(sequence_id, None)

    def end(self, error_type: str) -> None:
        """Record what has not ended by itself; the phase under way carries `error_type`."""
        for sequence_id in list(self._live):
            self._record(sequence_id, error_type)

    def _record(self, sequence_id: int, error_type: str | None) -> None:
        record_spans(
            self._live.pop(sequence_id),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens[sequence_id],
            ended_ns=time.time_ns(),
            error_type=error_type,
            context=self._context,
        )


def record_spans(
    timing: Timing,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    ended_ns: int,
    error_type: str | None = None,
    context: Context | None = None,
) -> None:
    """Record `queue`, `prefill` and `decode`, as far as they came, under the current span or that
    of `context`.

    `ended_ns` ends the phase that was under way, where the sequence did not finish by itself; that
    phase carries `error_type`.
    """
    phases = (
        (
            "queue",
            timing.queued_ns,
            timing.prefill_start_ns,
            {"meshserve.engine.preemptions": timing.preemptions},
        ),
        (
            "prefill",
            timing.prefill_start_ns,
            timing.first_token_ns,
            {"gen_ai.usage.input_tokens": prompt_tokens},
        ),
        (
            "decode",
            timing.first_token_ns,
            timing.finished_ns if error_type is None else 0,
            {"gen_ai.usage.output_tokens": completion_tokens},
        ),
    )
    tracer = get_tracer()
    for name, start_ns, end_ns, attributes in phases:
        if not start_ns:
            break
        span = tracer.start_span(name, context, attributes=attributes, start_time=start_ns)
        if not end_ns and error_type is not None:
            span.set_attribute("error.type", error_type)
            span.set_status(trace.Status(trace.StatusCode.ERROR, error_type))
        span.end(end_ns or max(start_ns, ended_ns))
