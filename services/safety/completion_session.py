"""One completion on a shared CheckCompletion stream: text in, released text out, a span around."""

from __future__ import annotations

from opentelemetry.trace import SpanKind

from meshserve.v1 import safety_pb2
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import get_tracer
from services.runtime.telemetry.tracing import context_of, mark_failed
from services.safety.messages import verdict_to_proto
from services.safety.policies_in_force import PolicyInForce
from services.safety.records import Records
from services.safety.session import CheckSession

SPAN_NAME = "check session"
_SUBJECT = "completion"


class CompletionSession:
    """Turns the inputs of one session into its outputs; see `CompletionInput` in the contract."""

    def __init__(
        self, opening: safety_pb2.CompletionInput, policy: PolicyInForce, records: Records
    ) -> None:
        given = opening.open
        self.finished = False
        self._session_id = opening.session_id
        self._revision = policy.revision
        self._tenant = given.tenant
        self._records = records
        self._check = CheckSession(policy.completions, released_text=given.released_text)
        self._messages = 0
        self._characters = 0
        records.sessions.inc()
        self._span = get_tracer().start_span(
            SPAN_NAME, context=context_of(given.trace), kind=SpanKind.SERVER
        )

    def feed(self, message: safety_pb2.CompletionInput) -> safety_pb2.CompletionOutput | None:
        """The answer to one input, if it brings text or ends the session."""
        self._messages += 1
        if not message.text and not message.finish:
            return None
        check = self._check
        self._characters += len(message.text)
        released = check.finish(message.text) if message.finish else check.feed(message.text)
        self.finished = message.finish or check.is_blocked
        output = safety_pb2.CompletionOutput(
            session_id=self._session_id,
            released_text=released,
            finished=self.finished,
            decided_characters=check.decided_chars,
        )
        if self.finished or check.new_findings:
            output.verdict.CopyFrom(verdict_to_proto(check.verdict, self._revision))
        if check.new_findings:
            self._records.found(_SUBJECT, check.new_findings, tenant=self._tenant)
            check.new_findings.clear()
        return output

    def close(self, error: ServiceError | None) -> None:
        """Ends the span."""
        self._records.sessions.dec()
        verdict = self._check.verdict
        self._records.checked(_SUBJECT, verdict.action)
        cancelled = error is not None and error.reason is Reason.CANCELLED
        span = self._span
        span.set_attribute("meshserve.session.messages", self._messages)
        span.set_attribute("meshserve.session.characters", self._characters)
        span.set_attribute("meshserve.session.cancelled", cancelled)
        span.set_attribute("meshserve.safety.action", verdict.action.name.lower())
        if verdict.findings:
            categories = sorted({finding.category for finding in verdict.findings})
            span.set_attribute("meshserve.safety.categories", categories)
        if error is not None and not cancelled:
            mark_failed(span, error)
        span.end()
