"""Spans of what happened to a sequence inside the core, made afterwards from its timing facts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

from opentelemetry import trace
from opentelemetry.context import Context
from prometheus_client import Histogram

from services.engine.core.messages import Delta, FinishReason, Timing
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import get_tracer
from services.runtime.telemetry.tracing import mark_failed

# A decode tells how far it is after so many tokens, and again at each multiple by the second
# number: a handful of events, however long it is.
FIRST_PROGRESS_TOKENS = 16
PROGRESS_FACTOR = 4


class SequenceSpans:
    """Follows the sequences of one request and records their spans, however they end."""

    def __init__(
        self,
        sequence_ids: Sequence[int],
        prompt_tokens: int,
        queue_duration: Histogram,
        context: Context | None = None,
    ) -> None:
        """`sequence_ids` are in the order of the choices. The spans are made in `context`; where it
        is None, in the current one."""
        self._context = context
        self._queue_duration = queue_duration
        # What belongs to a span that is not recorded is not recorded either.
        self._records = trace.get_current_span(context).is_recording()
        self._live = {
            sequence_id: _Sequence(choice, prompt_tokens, time.time_ns())
            for choice, sequence_id in enumerate(sequence_ids)
        }

    def follow(self, delta: Delta) -> None:
        """Take in a delta; its timing facts come with a first token and with the end."""
        timing = delta.timing
        if not self._records:
            if timing is not None and delta.sequence_id in self._live:
                self._observe_queue(timing)
                del self._live[delta.sequence_id]
            return
        sequence = self._live[delta.sequence_id]
        sequence.tokens += len(delta.token_ids)
        if timing is not None:
            if sequence.timing is None:
                self._observe_queue(timing)
                sequence.first_steps = timing.steps
            sequence.timing = timing
        finish = delta.finish
        if finish is None:
            if sequence.tokens >= sequence.next_progress:
                sequence.note_progress(time.time_ns())
        elif finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            del self._live[delta.sequence_id]
            sequence.record(self._context, timing.finished_ns if timing else 0, None)

    def end(self, error: ServiceError) -> None:
        """Record what has not ended by itself: the phase under way ends with `error`."""
        if self._records:
            now_ns = time.time_ns()
            for sequence in self._live.values():
                sequence.record(self._context, now_ns, error)
        self._live.clear()

    def _observe_queue(self, timing: Timing) -> None:
        if timing.prefill_start_ns:
            self._queue_duration.observe((timing.prefill_start_ns - timing.queued_ns) / 1e9)


class _Sequence:
    """One sequence of a request that is traced."""

    __slots__ = (
        "begun_ns",
        "choice",
        "first_steps",
        "next_progress",
        "progress",
        "prompt_tokens",
        "timing",
        "tokens",
    )

    def __init__(self, choice: int, prompt_tokens: int, begun_ns: int) -> None:
        self.begun_ns = begun_ns
        self.choice = choice
        self.prompt_tokens = prompt_tokens
        self.tokens = 0  # generated
        self.timing: Timing | None = None
        self.first_steps = 0  # until the first token
        self.next_progress = FIRST_PROGRESS_TOKENS
        self.progress: list[tuple[int, int]] = []  # (time, tokens)

    def note_progress(self, at_ns: int) -> None:
        """Remember how far it is."""
        self.progress.append((at_ns, self.tokens))
        while self.next_progress <= self.tokens:
            self.next_progress *= PROGRESS_FACTOR

    def record(self, context: Context | None, ended_ns: int, error: ServiceError | None) -> None:
        """Record `queue`, `prefill` and `decode`, as far as they came.

        `ended_ns` ends the last of them; with an `error` it failed, or was given up.
        """
        # Nothing is known of one that ended before its first token but that it waited for it.
        timing = self.timing or Timing(self.begun_ns, self.begun_ns)
        tracer = get_tracer()
        for name, start_ns, end_ns, attributes in self._phases(timing):
            if not start_ns:
                return
            # A sequence that failed, or was given up, did so in its last phase.
            is_last = not end_ns
            end_ns = end_ns or timing.finished_ns or max(start_ns, ended_ns)
            span = tracer.start_span(name, context, attributes=attributes, start_time=start_ns)
            events = sorted(self._events(timing, name), key=lambda event: event[1])
            for event, at_ns, details in events:
                if start_ns <= at_ns and (is_last or at_ns < end_ns):
                    span.add_event(event, details, min(at_ns, end_ns))
            if is_last and error is not None:
                if error.reason is Reason.CANCELLED:
                    span.add_event("cancelled", timestamp=end_ns)
                else:
                    mark_failed(span, error, end_ns)
            span.end(end_ns)

    def _phases(self, timing: Timing) -> Iterator[tuple[str, int, int, dict[str, int]]]:
        """The name, begin, end (0: it ended with the sequence) and attributes of each phase."""
        choice = {"meshserve.choice": self.choice}
        yield "queue", timing.queued_ns, timing.prefill_start_ns, choice
        yield (
            "prefill",
            timing.prefill_start_ns,
            timing.first_token_ns,
            {
                **choice,
                "meshserve.engine.prompt_tokens": self.prompt_tokens,
                "meshserve.engine.cached_prompt_tokens": timing.cached_prompt_tokens,
                "meshserve.engine.steps": self.first_steps,
            },
        )
        yield (
            "decode",
            timing.first_token_ns,
            0,
            {
                **choice,
                "meshserve.engine.completion_tokens": self.tokens,
                "meshserve.engine.steps": timing.steps - self.first_steps,
                "meshserve.engine.preemptions": timing.preemptions,
            },
        )

    def _events(
        self, timing: Timing, phase: str
    ) -> Iterator[tuple[str, int, dict[str, int | float]]]:
        """The name, time and attributes of what happened; `phase` sees what lies within it."""
        for position, at_ns in enumerate(timing.interruptions_ns):
            yield ("preempted", "resumed")[position % 2], at_ns, {}
        if phase != "decode":
            return
        yield "first_token", timing.first_token_ns, {}
        marks = [(timing.first_token_ns, 1), *self.progress]
        for (before_ns, before_tokens), (at_ns, tokens) in pairwise(marks):
            per_s = (tokens - before_tokens) * 1e9 / max(at_ns - before_ns, 1)
            yield (
                "progress",
                at_ns,
                {
                    "meshserve.engine.completion_tokens": tokens,
                    "meshserve.engine.tokens_per_s": round(per_s, 1),
                },
            )
        if timing.drafted_tokens:
            yield (
                "speculation",
                timing.finished_ns,
                {
                    "meshserve.engine.drafted_tokens": timing.drafted_tokens,
                    "meshserve.engine.accepted_draft_tokens": timing.accepted_draft_tokens,
                },
            )
