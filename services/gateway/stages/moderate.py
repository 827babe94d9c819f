"""The completion check: nothing leaves that the safety filter has not released."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from opentelemetry.trace import Span

from meshserve.v1 import safety_pb2, types_pb2
from services.gateway.context import RequestContext
from services.gateway.events import ChoiceEnd, Event, TextDelta
from services.gateway.peers import CheckPool
from services.gateway.pipeline import Stage
from services.gateway.safety_notes import note_unchecked, note_verdicts
from services.gateway.sessions import Session
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import SafetySettings
from services.runtime.telemetry.tracing import trace_context_of

log = logging.getLogger(__name__)

MAX_FINDINGS = 100
_FILTERED = types_pb2.FINISH_REASON_CONTENT_FILTER


class Moderate(Stage):
    """Lets text pass as the safety filter releases it; a block ends the choice."""

    name = "moderate"

    def __init__(self, settings: SafetySettings, pool: CheckPool) -> None:
        self._settings = settings
        self._pool = pool

    def stream(
        self, context: RequestContext, events: AsyncGenerator[Event], span: Span
    ) -> AsyncGenerator[Event]:
        """Raises ServiceError when the filter is away and must not be passed by."""
        if not self._settings.enabled or context.unchecked:
            # A filter that was away for the prompt would be waited for in vain again.
            return events
        return self._checked(context, events, span)

    async def _checked(
        self, context: RequestContext, events: AsyncGenerator[Event], span: Span
    ) -> AsyncGenerator[Event]:
        trace = trace_context_of(span)
        may_pass_by = self._settings.when_unavailable == "allow"
        checks = [
            _ChoiceCheck(self._pool, context, index, trace, may_pass_by)
            for index in range(context.choices)
        ]
        unended, filtered = len(checks), False
        try:
            async with aclosing(events):
                async for event in events:
                    check = checks[event.index]
                    if check.ended:
                        continue
                    for passed in await check.feed(event):
                        if isinstance(passed, ChoiceEnd):
                            unended -= 1
                            filtered |= passed.finish_reason == _FILTERED
                            if filtered and not unended:
                                # A blocked choice ends before its generation does; that ends now,
                                # not when a slow reader has read the end.
                                await events.aclose()
                                yield passed
                                return
                        yield passed
        finally:
            for check in checks:
                check.cancel()
            if context.unchecked:
                note_unchecked(span)
            else:
                note_verdicts(span, (check.verdict for check in checks if check.verdict))


class _ChoiceCheck:
    """The check of one choice, on a session that outlives the replica it began on."""

    def __init__(
        self,
        pool: CheckPool,
        context: RequestContext,
        index: int,
        trace: types_pb2.TraceContext,
        may_pass_by: bool,
    ) -> None:
        self.ended = False
        # Whether the filter has been told of the end.
        self._finished = False
        self._passed_by = False
        self._context = context
        self._index = index
        self._trace = trace
        self._may_pass_by = may_pass_by
        self.verdict: types_pb2.SafetyVerdict | None = None
        # What replicas that were lost had found, and how much longer the completion was than the
        # text they had released for it: a new replica knows the released text alone.
        self._earlier_verdict: types_pb2.SafetyVerdict | None = None
        self._redaction_shift = 0
        # Characters decided, the text released for them, and the text that is not decided yet.
        self._decided = 0
        self._released: list[str] = []
        self._undecided = ""
        # What is told beside the text waits for the text: (end of its text, the delta).
        self._details: deque[tuple[int, TextDelta]] = deque()
        self._session: Session[safety_pb2.CompletionInput, safety_pb2.CompletionOutput] = Session(
            pool, self._message, lambda sid: safety_pb2.CompletionInput(session_id=sid, cancel=True)
        )

    async def feed(self, event: Event) -> list[Event]:
        """What may be sent on of an event and of what was held back before it."""
        if isinstance(event, TextDelta):
            self._undecided += event.text
            if event.token_ids or event.logprobs is not None:
                self._details.append((self._decided + len(self._undecided), event))
            if not event.text:
                return self._released_delta("")
            return await self._exchange(event.text, finish=event.is_last)
        passed = [] if self._finished else await self._exchange("", finish=True)
        if not self.ended:
            self.ended = True
            if self.verdict is not None and self.verdict.findings:
                event.safety = self.verdict
            passed.append(event)
        return passed

    def cancel(self) -> None:
        """Gives the session up if it is not over."""
        self._session.cancel()

    async def _exchange(self, text: str, *, finish: bool) -> list[Event]:
        if self._passed_by:
            return self._pass_by()
        try:
            output = await self._session.exchange((text, finish))
        except ServiceError as error:
            if error.reason is not Reason.SERVICE_UNAVAILABLE or not self._may_pass_by:
                raise
            log.warning("the rest of a completion is not checked: %s", error.message)
            self._passed_by = self._context.unchecked = True
            return self._pass_by()
        self._finished = finish
        decided = output.decided_characters + self._redaction_shift
        self._undecided = self._undecided[decided - self._decided :]
        self._decided = decided
        self._released.append(output.released_text)
        if output.HasField("verdict"):
            self.verdict = _joined(self._earlier_verdict, output.verdict)
        passed = self._released_delta(output.released_text)
        if self._action == types_pb2.SAFETY_ACTION_BLOCK:
            self.ended = True
            # Other choices may keep the generation going; what it adds to this one is not counted.
            usage = types_pb2.Usage()
            usage.CopyFrom(self._context.usages[self._index])
            self._context.usages[self._index] = usage
            passed.append(ChoiceEnd(self._index, _FILTERED, None, usage, self.verdict))
        return passed

    def _pass_by(self) -> list[Event]:
        text, self._undecided = self._undecided, ""
        self._decided += len(text)
        self._released.append(text)
        return self._released_delta(text)

    @property
    def _action(self) -> types_pb2.SafetyAction.ValueType:
        if self.verdict is None:
            return types_pb2.SAFETY_ACTION_UNSPECIFIED
        return self.verdict.action

    def _released_delta(self, text: str) -> list[Event]:
        """The released text with the details of the tokens behind it.

        Once something was redacted or blocked no more details are told: token ids spell the text.
        """
        delta = TextDelta(self._index, text)
        tellable = self._action < types_pb2.SAFETY_ACTION_REDACT
        while self._details and self._details[0][0] <= self._decided:
            _, source = self._details.popleft()
            if not tellable:
                continue
            delta.token_ids += source.token_ids
            if source.logprobs is not None:
                if delta.logprobs is None:
                    delta.logprobs = types_pb2.Logprobs()
                delta.logprobs.MergeFrom(source.logprobs)
        return [delta] if delta.text or delta.token_ids or delta.logprobs is not None else []

    def _message(
        self, session_id: int, payload: tuple[str, bool], opening: bool
    ) -> safety_pb2.CompletionInput:
        text, finish = payload
        message = safety_pb2.CompletionInput(session_id=session_id, text=text, finish=finish)
        if opening:
            # On a first stream this is a plain beginning; on a later one it restores the state.
            released = "".join(self._released)
            self._redaction_shift = self._decided - len(released)
            self._earlier_verdict = self.verdict
            message.open.tenant = self._context.tenant.name
            message.open.trace.CopyFrom(self._trace)
            message.open.released_text = released
            message.text = self._undecided
        return message


def _joined(
    earlier: types_pb2.SafetyVerdict | None, verdict: types_pb2.SafetyVerdict
) -> types_pb2.SafetyVerdict:
    """Both findings under the stronger action."""
    if earlier is None:
        return verdict
    return types_pb2.SafetyVerdict(
        action=max(earlier.action, verdict.action),
        findings=[*earlier.findings, *verdict.findings][:MAX_FINDINGS],
        policy_revision=verdict.policy_revision,
    )
