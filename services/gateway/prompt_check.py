"""The safety filter's word on the texts of a request."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry import trace

from meshserve.v1 import safety_pb2, safety_pb2_grpc, types_pb2
from services.gateway.context import CallContext
from services.gateway.field_paths import renamed_fields
from services.gateway.policy import PolicyWatch
from services.gateway.prompt_texts import PromptText
from services.gateway.safety_notes import note_unchecked, note_verdicts
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import SafetySettings

log = logging.getLogger(__name__)


class PromptCheck:
    """Blocks, or replaces what must not reach the model. `enabled`: whether there is a filter."""

    def __init__(
        self,
        settings: SafetySettings,
        safety: safety_pb2_grpc.SafetyServiceAsyncStub,
        policy: PolicyWatch,
    ) -> None:
        self.enabled = settings.enabled
        self._lets_pass_unchecked = settings.when_unavailable == "allow"
        self._safety = safety
        self._policy = policy

    async def __call__(self, context: CallContext, texts: Sequence[PromptText]) -> None:
        """Raises ServiceError (PROMPT_BLOCKED), which names the texts at fault."""
        query = safety_pb2.CheckPromptRequest(
            texts=[each.text for each in texts], tenant=context.tenant.name
        )
        try:
            response = await self._safety.CheckPrompt(query)
        except ServiceError as error:
            away = error.reason in (Reason.SERVICE_UNAVAILABLE, Reason.DRAINING)
            if not away or not self._lets_pass_unchecked:
                names = {f"texts[{index}]": each.path for index, each in enumerate(texts)}
                with renamed_fields(names):
                    raise
            log.warning("a prompt is not checked: %s", error.message)
            context.unchecked = True
            note_unchecked(trace.get_current_span())
            return
        verdict = response.verdict
        note_verdicts(trace.get_current_span(), [verdict])
        self._policy.seen(verdict.policy_revision)
        if verdict.findings:
            context.prompt_safety = verdict
        if verdict.action == types_pb2.SAFETY_ACTION_BLOCK:
            raise _blocked(verdict, texts)
        if verdict.action == types_pb2.SAFETY_ACTION_REDACT:
            for each, redacted in zip(texts, response.redacted_texts, strict=True):
                if redacted != each.text:
                    each.replace(redacted)
            context.input_version += 1


def _blocked(verdict: types_pb2.SafetyVerdict, texts: Sequence[PromptText]) -> ServiceError:
    blocking = [
        finding for finding in verdict.findings if finding.action == types_pb2.SAFETY_ACTION_BLOCK
    ]
    categories = sorted({finding.category for finding in blocking})
    at_fault = dict.fromkeys(
        (texts[finding.text_index].path, f"blocked: {finding.category}") for finding in blocking
    )
    return ServiceError(
        Reason.PROMPT_BLOCKED,
        f"the safety filter blocked the prompt: {', '.join(categories)}",
        field_violations=list(at_fault),
        metadata={"categories": ",".join(categories)},
    )
